"""What `fit` prints when a run has ended: a table, how it is continued, and a sample of the best model."""

from pathlib import Path
from typing import Any

from minigpt_pl.checkpoint.io import BEST_CKPT, read_checkpoint
from minigpt_pl.training.sampling import SampleCallback, generate_sample
from minigpt_pl.training.summary import format_summary, resume_command


def print_report(
    trainer: Any, model: Any, summary: dict[str, Any] | None, run_dir: Path, config: dict[str, Any], with_sample: bool
) -> None:
    """Prints the report.

    Args:
        trainer: Of the run.
        model: Its LanguageModel; its weights are replaced by those of best.ckpt.
        summary: The content of summary.json, or None if the run had ended before.
        run_dir: The run's directory.
        config: The run's configuration.
        with_sample: Whether a sample is printed, if the run writes samples: with its prompt and its options.
    """
    if summary is None:
        print(f"{run_dir} has already reached trainer.max_steps {trainer.max_steps}: nothing is left to train")
        print(f"train longer with: {resume_command('completed', run_dir, config)}")
        return
    print(f"\n{format_summary(summary, run_dir)}")
    best = run_dir / BEST_CKPT
    samples = next((callback for callback in trainer.callbacks if isinstance(callback, SampleCallback)), None)
    if with_sample and samples and best.exists():
        model.load_state_dict(read_checkpoint(best)["state_dict"])
        text = generate_sample(trainer, model, samples.prompt, samples.sampling)
        print(f"\nA sample from best.ckpt:\n{text}")
