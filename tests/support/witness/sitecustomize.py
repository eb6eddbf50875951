"""Loaded by Python itself in a process that a test starts: writes where in a run the process is, and can cause faults.

The file $WITNESS holds the current place, also after SIGKILL; files beside it hold the metrics of each process's
evaluations. The package itself knows nothing of this file.
"""

import os
import sys
from importlib.machinery import PathFinder


def mark(place, step=0):
    if RANK == "0":
        os.pwrite(FILE, f"{place} {step:<20}"[:32].encode(), 0)


def in_modules(module):
    train, evaluate = module.LanguageModel.training_step, module.LanguageModel.validation_step

    def training_step(self, batch, batch_idx):
        mark("step", self.trainer.global_step + 1)
        return train(self, batch, batch_idx)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        mark("evaluation", self.trainer.global_step)
        return evaluate(self, batch, batch_idx, dataloader_idx)

    module.LanguageModel.training_step, module.LanguageModel.validation_step = training_step, validation_step


def in_summary(module):
    write = module.RunSummary.on_train_end

    def on_train_end(self, trainer, pl_module):
        mark("end", trainer.global_step)
        return write(self, trainer, pl_module)

    module.RunSummary.on_train_end = on_train_end


def in_checkpoint(module):
    if FAULT == "torn":  # the file is written where it stands, as a plain torch.save would
        import time

        import torch

        def save_checkpoint(self, checkpoint, path, storage_options=None):
            checkpoint["digest"] = module.tensor_digest(checkpoint)
            with open(path, "wb") as file:
                file.write(b"x")
                file.flush()
                open(f"{path}.writing", "w").close()
                time.sleep(0.5)  # long enough for a signal to arrive, on any machine
                file.seek(0)
                torch.save(checkpoint, file)
            os.unlink(f"{path}.writing")

        module.AtomicCheckpointIO.save_checkpoint = save_checkpoint


def in_metrics(module):
    end = module.TrainMetrics.on_validation_end

    def on_validation_end(self, trainer, pl_module):
        with open(f"{os.environ['WITNESS']}.evals-{RANK}", "a") as file:
            file.write(f"{trainer.global_step} {pl_module.eval_metrics}\n")
        return end(self, trainer, pl_module)

    module.TrainMetrics.on_validation_end = on_validation_end


HOOKS = {
    "minigpt_pl.training.lit_modules": in_modules,
    "minigpt_pl.training.summary": in_summary,
    "minigpt_pl.checkpoint.io": in_checkpoint,
    "minigpt_pl.training.metrics": in_metrics,
}


class Finder:
    """Calls a hook when its module has been loaded."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in HOOKS or (spec := PathFinder.find_spec(name, path, target)) is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            HOOKS[name](module)

        spec.loader.exec_module = exec_module
        return spec


if "WITNESS" in os.environ:
    RANK = os.environ.get("LOCAL_RANK", "0")
    FILE = os.open(os.environ["WITNESS"], os.O_CREAT | os.O_WRONLY)
    FAULT = os.environ.get("FAULT")
    mark("start")
    sys.meta_path.insert(0, Finder)
