// From base64 to named tensors: float16 weights become Float32Array. What is computed with them is in model.js.

export function bytesOfBase64(text) {
  const binary = atob(text.trim());
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

export function float32OfFloat16(halves) {
  // All 65,536 values are computed once: a table is faster than arithmetic for a million weights.
  const table = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    if (exponent === 31) table[bits] = fraction ? NaN : sign * Infinity;
    else if (exponent === 0) table[bits] = sign * fraction * 2 ** -24;
    else table[bits] = sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  }
  const result = new Float32Array(halves.length);
  for (let i = 0; i < halves.length; i++) result[i] = table[halves[i]];
  return result;
}

// `shapes` lists [name, shape] in the order in which the tensors stand one after the other.
export function namedTensors(base64, shapes) {
  const bytes = bytesOfBase64(base64);
  const all = float32OfFloat16(new Uint16Array(bytes.buffer, 0, bytes.length / 2));
  const tensors = {};
  let start = 0;
  for (const [name, shape] of shapes) {
    const size = shape.reduce((a, b) => a * b, 1);
    tensors[name] = all.subarray(start, start + size);
    start += size;
  }
  return tensors;
}
