// Asks the worker: each question is answered by a promise; a long one also sends parts.

export class Client {
  constructor(source) {
    const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
    this.worker = new Worker(url);
    this.waiting = new Map();
    this.count = 0;
    this.worker.onmessage = ({ data }) => this.receive(data);
  }

  ask(question, content, onpart = null) {
    const id = this.count++;
    this.worker.postMessage({ id, question, content });
    return new Promise((resolve, reject) => this.waiting.set(id, { resolve, reject, onpart }));
  }

  receive({ id, part, answer, error }) {
    const { resolve, reject, onpart } = this.waiting.get(id);
    if (part) return onpart?.(part);
    this.waiting.delete(id);
    return error ? reject(new Error(error)) : resolve(answer);
  }
}
