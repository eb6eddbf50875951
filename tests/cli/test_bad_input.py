"""What a user gets wrong costs one line: exit status 2, nothing on stdout, nothing on disk changed.

`pytest tests/cli/test_bad_input.py -k table -s` prints the table of mistakes; `python tests/cli/test_bad_input.py` writes it to
docs/errors.md.
"""

# ruff: noqa: E501  (the rows of the table)

import os
import random
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, Outcome
from lightning.pytorch.accelerators import AcceleratorRegistry

from minigpt_pl.cli.options import RESERVED, option_specs

MiniGPT = Callable[..., Outcome]

PAGE = PROJECT / "docs" / "errors.md"
HEAD = """# What is said to a mistake

Each command ends with exit status 2, writes this one line to stderr after `error: `, nothing to stdout, and leaves the disk
as it was. `...` stands for what differs between machines; `tiny.yaml` is a file of small sizes, `run` a run directory.
`python tests/cli/test_bad_input.py` writes this page from the cases that the tests try.
"""

FIT, VALIDATE, PREDICT = "fit -c tiny.yaml", "validate --ckpt_path run/best.ckpt", "predict --ckpt_path run/best.ckpt"
CASES = {
    "Commands": [
        ("", "a command is missing: give one of fit, validate, test, predict..."),
        ("fti", "fti is no command, which comes first: did you mean fit?"),
        ("sample", "sample is no command, which comes first: give one of fit, validate, test, predict..."),
        ("--model ModernLM fit", "--model is no command, which comes first: give one of fit, validate, test, predict..."),
    ],
    "Options": [
        (f"{FIT} --model.dropot 0.5", "--model.dropot 0.5: there is no such setting; did you mean --model.dropout?"),
        (f"{FIT} --early_stopping.patienc 5", "--early_stopping.patienc 5: there is no such setting; did you mean --early_stopping.patience?"),
        (f"{FIT} --trainer.max_step 5", "--trainer.max_step 5: there is no such setting; did you mean --trainer.max_steps?"),
        (f"{FIT} --batch_size 5", "--batch_size 5: there is no such setting; did you mean --data.batch_size?"),
        (f"{FIT} --out_dir x", "--out_dir x: there is no such setting; did you mean --run_dir?"),
        (f"{FIT} --frobnicate", "--frobnicate: there is no such setting; minigpt fit --help lists them"),
        (f"{FIT} more", "more: options begin with --"),
        (f"{FIT} --data.batch_size", "--data.batch_size: its value is missing; one that begins with -- is given as --data.batch_size=VALUE"),
        (f"{FIT} --data.batch_size=", "--data.batch_size '': it must be a whole number"),
        (f"{FIT} --data.batch_size many", "--data.batch_size many: it must be a whole number"),
        (f"{FIT} --data.batch_size 1.5", "--data.batch_size 1.5: it must be a whole number"),
        (f"{FIT} --data.batch_size null", "--data.batch_size null: it must be a whole number"),
        (f"{FIT} --model.lr fast", "--model.lr fast: it must be a finite number"),
        (f"{FIT} --model.compile perhaps", "--model.compile perhaps: it must be true or false"),
        (f"{FIT} --data.tokenizer word", "--data.tokenizer word: it must be char or bpe"),
        (f"{FIT} --data.eval_mode ful", "--data.eval_mode ful: it must be full or sampled"),
        (f"{FIT} --model.lr_schedule linear", "--model.lr_schedule linear: it must be cosine or constant"),
        (f"{FIT} --sample.top_k 3", "--sample.top_k 3: only predict has it: leave it out"),
        (f"{VALIDATE} --trainer.max_steps 5", "--trainer.max_steps 5: only fit has it: leave it out"),
        (f"{FIT} --data.block_size 8", "--data.block_size 8: it is the model's: set --model.block_size"),
        (f"{FIT} --data.seed 5", "--data.seed 5: the whole run has one: set --seed_everything"),
        (f"{FIT} --model.vocab_size 7", "--model.vocab_size 7: it follows the tokenizer: leave it out"),
        (f"{FIT} --model.init_args.vocab_size 7", "--model.init_args.vocab_size 7: it follows the tokenizer: leave it out"),
        (f"{FIT} --data '{{\"seed\": 7}}'", "--data.seed 7: the whole run has one: set --seed_everything"),
        (f"{FIT} --early_stopping 5", "--early_stopping 5: give null for none, or its settings by name, such as --early_stopping.patience"),
        (f"{FIT} --samples false", "--samples false: give null for none, or its settings by name, such as --samples.every_n_evals"),
        (f"{FIT} --checkpoint null", "--checkpoint null: give its settings by name, such as --checkpoint.every_n_train_steps"),
        (f"{FIT} --trainer.val_check_interval 5", "--trainer.val_check_interval 5: minigpt decides it: use --data.eval_every"),
        (f"{FIT} --trainer.max_epochs 5", "--trainer.max_epochs 5: minigpt decides it: use --trainer.max_steps"),
        (f"{FIT} --trainer.logger CSVLogger", "--trainer.logger CSVLogger: minigpt decides it: use --wandb"),
        (f"{FIT} --trainer.default_root_dir x", "--trainer.default_root_dir x: minigpt decides it: use --run_dir"),
    ],
    "Files of settings": [
        ("fit -c", "-c needs a file, such as -c smoke"),
        ("fit --config=", "--config needs a file, such as --config smoke"),
        ("fit -c nothing.yaml", "-c nothing.yaml: there is no such file; shipped are bpe, classic, ... and others"),
        ("fit -c journey/p2_refin", "-c journey/p2_refin: there is no such file; did you mean journey/p2_refine?"),
        ("fit -c folder", "-c folder is no file: name a YAML file"),
        ("fit -c empty.txt", "-c empty.txt is empty: write settings by name, such as data: {batch_size: 16}"),
        ("fit -c list.yaml", "-c list.yaml is a list: write settings by name, such as data: {batch_size: 16}"),
        ("fit -c short.txt", "-c short.txt is no settings: write settings by name, such as data: {batch_size: 16}"),
        ("fit -c broken.yaml", "-c broken.yaml is not YAML: ... in line 2"),
        ("fit -c latin.txt", "-c latin.txt is not UTF-8: byte 3 is 0xe9; convert the file to UTF-8"),
        ("fit -c key.yaml", "data.bath_size 5 in key.yaml: there is no such setting; did you mean data.batch_size?"),
        ("fit -c type.yaml", "data.batch_size many in type.yaml: it must be a whole number"),
        ("fit -c value.yaml", "data.batch_size 0: it must be at least 1 (value.yaml)"),
        ("fit -c null.yaml", "data.tokenizer null: it must be char or bpe (null.yaml)"),
        ("fit -c class.yaml", "model ModrenLM in class.yaml: there is no such model; did you mean ModernLM?"),
        ("fit -c group.yaml", "trainer 5 in group.yaml: its settings stand below it, each by its name"),
        ("fit -c none.yaml", "model null in none.yaml: its settings stand below it, each by its name"),
        ("fit -c follows.yaml", "data.block_size 7 in follows.yaml: it is the model's: set --model.block_size"),
        ("fit -c experts.yaml", "model.n_experts 4 in experts.yaml: ClassicLM has no such setting: give --model ModernLM, or leave it out"),
        ("fit -c place.yaml", "run_dir run in place.yaml: give it on the command line, as --run_dir run"),
        ("fit -c start.yaml", "ckpt_path run/last.ckpt in start.yaml: give it on the command line, as --ckpt_path run/last.ckpt"),
        ("fit --data nothing.yaml", "--data nothing.yaml: give its settings by name, such as --data.path"),
    ],
    "The text": [
        (f"{FIT} --data.path nothing.txt", "--data.path nothing.txt does not exist: name a text file"),
        (f"{FIT} --data.path ''", "--data.path needs a value, such as data/input.txt"),
        (f"{FIT} --data.path empty.txt", "--data.path empty.txt is empty: name another text file"),
        (f"{FIT} --data.path blank.txt", "--data.path blank.txt is blank, 7 characters of white space: name another text file"),
        (f"{FIT} --data.path folder", "--data.path folder is a directory: name a text file"),
        (f"{FIT} --data.path sea.txt/below", "--data.path sea.txt/below cannot be read (Not a directory): name a text file"),
        (f"{FIT} --data.path pipe", "--data.path pipe is no regular file, and a text is read more than once: save it in a file"),
        (f"{FIT} --data.path latin.txt", "--data.path latin.txt is not UTF-8: byte 3 is 0xe9; convert the file to UTF-8"),
        (f"{FIT} --data.path utf16.txt", "--data.path utf16.txt is UTF-16, by its first two bytes: convert it to UTF-8"),
        (f"{FIT} --data.path short.txt", "--data.path short.txt is too short: its train part has 9 tokens and needs 17, so the text needs about 20 characters, and has 11; a smaller model.block_size needs less"),
        (f"{FIT} --data.path short.txt --model.block_size 8 --data.train_frac 0.95", "--data.path short.txt is too short: its val part has 1 tokens..."),
        (f"{FIT} --data.test_frac 0.0002", "data.path sea.txt is too short: its test part has 1 tokens and needs 2..."),
        (f"{FIT} --data.train_frac 0.99 --data.eval_mode sampled --model.block_size 64", "data.path sea.txt is too short: its val part has ... tokens and needs 65..."),
        (f"{FIT} --data.train_frac 1", "--data.train_frac 1: it must lie between 0 and 1"),
        (f"{FIT} --data.train_frac nan", "--data.train_frac nan: it must be a finite number"),
        (f"{FIT} --data.test_frac -0.1", "--data.test_frac -0.1: it must be at least 0 and below 1"),
        (f"{FIT} --data.train_frac 0.9 --data.test_frac 0.2", "--data.train_frac 0.9 and --data.test_frac 0.2 leave nothing to validate on: their sum must be below 1"),
        (f"{FIT} --data.tokenizer bpe --data.bpe_vocab_size 5", "--data.bpe_vocab_size 5, but the text has ... distinct characters: give at least ..."),
        (f"{FIT} --data.bpe_vocab_size 10000000000", "--data.bpe_vocab_size 10000000000: it must be at most 1,000,000"),
        (f"{FIT} --data.bpe_min_pair_freq 0", "--data.bpe_min_pair_freq 0: it must be at least 1"),
        (f"{FIT} --data.batch_size 0", "--data.batch_size 0: it must be at least 1"),
        (f"{FIT} --data.eval_every 0", "--data.eval_every 0: it must be at least 1"),
        (f"{FIT} --data.eval_iters 0", "--data.eval_iters 0: it must be at least 1"),
        (f"{FIT} --data.max_eval_tokens 0", "--data.max_eval_tokens 0: it must be at least 1"),
        (f"{FIT} --data.token_noise 1", "--data.token_noise 1: it must be at least 0 and below 1"),
        (f"{FIT} --data.num_workers -1", "--data.num_workers -1: it must be 0, for none, or more"),
        (f"{FIT} --data.num_workers 5000", "--data.num_workers 5000: it must be at most ... on this machine"),
        (f"{FIT} --data.batch_size 9999999999999", "--data.batch_size 9999999999999: it must be at most 1,000,000,000,000"),
        (f"{FIT} --data.batch_size 999999999999", "a batch takes ... GiB of memory, and this machine has ...: lower --data.batch_size or model.block_size"),
    ],
    "The model": [
        (f"{FIT} --model ModrenLM", "--model ModrenLM: there is no such model; did you mean ModernLM?"),
        (f"{FIT} --model os.system", "--model os.system: there is no such model; there are ClassicLM, ModernLM, AblationLM"),
        (f"{FIT} --model null", "--model null: there is no such model; there are ClassicLM, ModernLM, AblationLM"),
        (f"{FIT} --model ClassicLM --model.n_experts 4", "--model.n_experts 4: ClassicLM has no such setting: give --model ModernLM, or leave it out"),
        (f"{FIT} --model.n_experts 4 --model ClassicLM", "--model.n_experts 4: ClassicLM has no such setting: give --model ModernLM, or leave it out"),
        (f"{FIT} --model.n_embd 30 --model.n_head 4", "--model.n_embd is 30 and --model.n_head 4: n_head must divide n_embd into heads of even width, for rotary positions"),
        (f"{FIT} --model.n_embd 6 --model.n_head 2", "--model.n_embd is 6 and --model.n_head 2: n_head must divide n_embd into heads of even width, for rotary positions"),
        (f"{FIT} --model ClassicLM --model.n_embd 9", "--model.n_embd is 9 and model.n_head 2: n_head must divide n_embd"),
        (f"{FIT} --model.n_embd -4", "--model.n_embd -4: it must be positive"),
        (f"{FIT} --model.n_layer 0", "--model.n_layer 0: it must be positive"),
        (f"{FIT} --model.n_head 0", "--model.n_head 0: it must be positive"),
        (f"{FIT} --model.block_size 0", "--model.block_size 0: it must be positive"),
        (f"{FIT} --model.dropout 1", "--model.dropout 1: it must be at least 0 and below 1"),
        (f"{FIT} --model.init_args.dropout 1.5", "--model.init_args.dropout 1.5: it must be at least 0 and below 1"),
        (f"{FIT} --model.dropout nan", "--model.dropout nan: it must be a finite number"),
        (f"{FIT} --model.lr 0", "--model.lr 0: it must be positive"),
        (f"{FIT} --model.lr inf", "--model.lr inf: it must be a finite number"),
        (f"{FIT} --model.muon_lr 0", "--model.muon_lr 0: it must be positive"),
        (f"{FIT} --model.optimizer sgd", "--model.optimizer sgd: it must be adamw or muon"),
        (f"{FIT} --model.conv_kernel_size -1", "--model.conv_kernel_size -1: it must be 0, for no convolutions, or more"),
        (f"{FIT} --model.weight_decay -0.1", "--model.weight_decay -0.1: it must be 0 or positive"),
        (f"{FIT} --model.n_experts -1", "--model.n_experts -1: it must be 0, for a dense model, or more"),
        (f"{FIT} --model.n_experts 2 --model.moe_top_k 3", "--model.moe_top_k 3: it must be at least 1 and at most n_experts, 2"),
        (f"{FIT} --model.n_experts 2 --model.moe_top_k 0", "--model.moe_top_k 0: it must be at least 1 and at most n_experts, 2"),
        (f"{FIT} --model.moe_gate softmax", "--model.moe_gate softmax: it must be softmax_all or softmax_selected"),
        (f"{FIT} --model.moe_aux_loss_coef -1", "--model.moe_aux_loss_coef -1: it must be 0 or positive"),
        (f"{FIT} --model.rope_theta 0", "--model.rope_theta 0: it must be positive"),
        (f"{FIT} --model.rms_norm_eps 0", "--model.rms_norm_eps 0: it must be positive"),
        (f"{FIT} --model.ffn_mult 0", "--model.ffn_mult 0: it must be positive"),
        (f"{FIT} --model.ffn_mult 0.001", "--model.ffn_mult 0.001: it must give n_embd, ..., a hidden width of at least 1"),
        (f"{FIT} --model.n_layer 999999999999", "the model takes ... GiB of memory, and this machine has ...: lower --model.n_layer, model.n_embd or model.n_experts"),
        (f"{FIT} --model.n_embd 999999999996", "--model.n_embd 999999999996: it must be much smaller"),
        (f"{FIT} --seed_everything -1", "--seed_everything -1: it must be at least 0 and below 2^32"),
        (f"{FIT} --seed_everything 99999999999", "--seed_everything 99999999999: it must be at least 0 and below 2^32"),
    ],
    "Training": [
        (f"{FIT} --trainer.max_steps 0", "--trainer.max_steps 0: it must be at least 1"),
        (f"{FIT} --trainer.max_steps 1e3", "--trainer.max_steps 1e3: it must be a whole number"),
        (f"{FIT} --trainer.accumulate_grad_batches 0", "--trainer.accumulate_grad_batches 0: it must be at least 1"),
        (f"{FIT} --trainer.log_every_n_steps 0", "--trainer.log_every_n_steps 0: it must be at least 1"),
        (f"{FIT} --trainer.gradient_clip_val -1", "--trainer.gradient_clip_val -1: it must be positive, or null for no clipping"),
        (f"{FIT} --trainer.max_time soon", "--trainer.max_time soon: write DD:HH:MM:SS, such as 00:01:30:00"),
        (f"{FIT} --trainer.accelerator cdua", "--trainer.accelerator cdua: this machine has ...; auto takes the best"),
        (f"{FIT} --trainer.devices 0", "--trainer.devices 0: give auto, or a number from 1 to ..."),
        (f"{FIT} --trainer.devices 99999", "--trainer.devices 99999: give auto, or a number from 1 to ..."),
        (f"{FIT} --trainer.strategy foo", "--trainer.strategy foo: You selected an invalid strategy name: strategy='foo'"),
        (f"{FIT} --trainer.precision 7", "--trainer.precision 7: it must be 32-true or bf16-mixed, among others"),
        (f"{FIT} --trainer.precision 16-mixed", "--trainer.precision 16-mixed: fp16 is not supported: take 32-true or bf16-mixed"),
        (f"{FIT} --trainer.callbacks EarlyStoping", "--trainer.callbacks EarlyStoping: there is no class EarlyStoping; did you mean EarlyStopping?"),
        (f"{FIT} --trainer.callbacks EarlyStopping", "--trainer.callbacks EarlyStopping: it needs monitor too"),
        (f"{FIT} --trainer.callbacks+=LearningRateMonitor --trainer.callbacks.often 3", "--trainer.callbacks.often 3: its class has no often"),
        (f"{FIT} --early_stopping.patience 0", "--early_stopping.patience 0: it must be at least 1; null never stops"),
        (f"{FIT} --early_stopping.min_delta -1", "--early_stopping.min_delta -1: it must be 0 or positive"),
        (f"{FIT} --checkpoint.every_n_train_steps 0", "--checkpoint.every_n_train_steps 0: it must be at least 1"),
        (f"{FIT} --checkpoint.every_n_minutes 0", "--checkpoint.every_n_minutes 0: it must be positive"),
        (f"{FIT} --samples.every_n_evals 0", "--samples.every_n_evals 0: it must be at least 1"),
        (f"{FIT} --samples.prompt=~", "--samples.prompt ~: it must be text"),
        (f"{FIT} --samples.temperature -1", "--samples.temperature -1: it must be 0 or a positive number"),
        (f"{FIT} --wandb.offline perhaps", "--wandb.offline perhaps: it must be true or false"),
    ],
    "Run directories": [
        (f"{FIT} --run_dir", "--run_dir needs a value, such as runs/first"),
        (f"{FIT} --run_dir=", "--run_dir needs a value, such as runs/first"),
        (f"{FIT} --run_dir run", "--run_dir run holds a run: go on with it by --ckpt_path last, or choose another --run_dir"),
        (f"{FIT} --run_dir sea.txt", "--run_dir sea.txt cannot be written (File exists): choose another"),
        (f"{FIT} --run_dir sea.txt/below", "--run_dir sea.txt/below cannot be written (Not a directory): choose another"),
        ("fit --ckpt_path last", "--ckpt_path last needs --run_dir: give both, or the checkpoint's file"),
        ("fit --ckpt_path last --run_dir elsewhere", "--ckpt_path last: there is no elsewhere/last.ckpt: give a checkpoint that minigpt wrote"),
        ("fit --ckpt_path ''", "--ckpt_path needs a value, such as last"),
        ("fit --ckpt_path best --run_dir run", "--ckpt_path best: a run goes on from last; to branch off its best, give --ckpt_path run/best.ckpt --run_dir NEW"),
        ("fit --ckpt_path run/best.ckpt", "--ckpt_path run/best.ckpt is not where a run stopped: give its branch a place with --run_dir NEW, or go on from last.ckpt"),
        ("fit --ckpt_path run/best.ckpt --run_dir run", "--run_dir run holds a run: go on with it by --ckpt_path last, or choose another --run_dir"),
    ],
    "Checkpoints": [
        ("validate", "validate needs a trained model: --ckpt_path FILE, or last or best with --run_dir"),
        ("predict --sample.prompt sea", "predict needs a trained model: --ckpt_path FILE, or last or best with --run_dir"),
        ("validate --ckpt_path run/none.ckpt", "--ckpt_path run/none.ckpt does not exist; run/last.ckpt is there: try it"),
        ("predict --ckpt_path run", "--ckpt_path run is a directory: name a file in it, such as run/last.ckpt"),
        ("fit --ckpt_path run/last.ckpt --run_dir NEW", "--ckpt_path run/last.ckpt has done trainer.max_steps 1 already: give --trainer.max_steps MORE"),
        ("validate --ckpt_path truncated.ckpt", "--ckpt_path truncated.ckpt is not a whole checkpoint (... bytes): give a checkpoint that minigpt wrote"),
        ("validate --ckpt_path empty.txt", "--ckpt_path empty.txt is not a whole checkpoint (0 bytes): give a checkpoint that minigpt wrote"),
        ("predict --ckpt_path sea.txt", "--ckpt_path sea.txt is not a whole checkpoint (... bytes): give a checkpoint that minigpt wrote"),
        ("fit --ckpt_path flipped/last.ckpt", "--ckpt_path flipped/last.ckpt is damaged: its weights or optimizer states differ from their digest; flipped/best.ckpt is there: try it"),
        ("validate --run_dir flipped --ckpt_path last", "--ckpt_path last: flipped/last.ckpt is damaged: its weights or optimizer states differ from their digest; flipped/best.ckpt is there: try it"),
        ("predict --ckpt_path foreign.ckpt", "--ckpt_path foreign.ckpt is not a checkpoint that minigpt wrote: give a checkpoint that minigpt wrote"),
        ("fit --run_dir run --ckpt_path last --model.n_layer 3", "--model.n_layer 3, but run/last.ckpt has 1: leave it out, or train anew"),
        ("fit --run_dir run --ckpt_path last --model ClassicLM", "--model ClassicLM: run/last.ckpt holds a ModernLM; leave it out, or train anew"),
        ("fit --run_dir run --ckpt_path last --data.tokenizer bpe", "--data.tokenizer bpe, but run/last.ckpt has char: leave it out, or train anew"),
        (f"{VALIDATE} --data.train_frac 0.8", "--data.train_frac 0.8, but run/best.ckpt has 0.9: leave it out, or train anew"),
        (f"{VALIDATE} --model.init_args.rope_theta 5", "--model.init_args.rope_theta 5, but run/best.ckpt has 10000.0: leave it out, or train anew"),
        (f"{VALIDATE} --data.path other.txt", "--data.path other.txt is not the text that the checkpoint was trained on: name that one with --data.path FILE, or give --data.allow_data_change true"),
        ("test --ckpt_path run/best.ckpt", "data.test_frac is 0: there is no test part; give the share of the text to test on"),
    ],
    "SamplingConfig": [
        (f"{PREDICT} --sample.temperature -1", "--sample.temperature -1: it must be 0 or a positive number"),
        (f"{PREDICT} --sample.temperature nan", "--sample.temperature nan: it must be a finite number"),
        (f"{PREDICT} --sample.top_k -1", "--sample.top_k -1: it must be 0, for all tokens, or more"),
        (f"{PREDICT} --sample.top_p 0", "--sample.top_p 0: it must be above 0 and at most 1"),
        (f"{PREDICT} --sample.top_p 1.5", "--sample.top_p 1.5: it must be above 0 and at most 1"),
        (f"{PREDICT} --sample.max_new_tokens 0", "--sample.max_new_tokens 0: it must be at least 1 and at most 10,000,000"),
        (f"{PREDICT} --sample.num_samples 0", "--sample.num_samples 0: it must be at least 1 and at most 10,000"),
        (f"{PREDICT} --sample.num_samples 99999999999", "--sample.num_samples 99999999999: it must be at least 1 and at most 10,000"),
        (f"{PREDICT} --sample.seed -1", "--sample.seed -1: it must be 0 or more"),
        (f"{PREDICT} --sample.prompt 'thé Ω'", "--sample.prompt thé Ω: the model never saw 'é' 'Ω': leave out these characters"),
        (f"{PREDICT} --sample.prompt --all", "--sample.prompt: its value is missing; one that begins with -- is given as --sample.prompt=VALUE"),
        (f"{PREDICT} --sample.prompt_file nothing.txt", "--sample.prompt_file nothing.txt cannot be read: No such file or directory"),
        (f"{PREDICT} --sample.prompt_file empty.txt", "--sample.prompt_file empty.txt is empty: give one prompt a line"),
        (f"{PREDICT} --sample.prompt_file latin.txt", "--sample.prompt_file latin.txt is not UTF-8: byte 3"),
        (f"{PREDICT} --sample.prompt_file other.txt", "--sample.prompt_file other.txt line 1: the model never saw ...: leave out these characters"),
        (f"{PREDICT} --sample.prompt sea --sample.prompt_file sea.txt", "--sample.prompt and --sample.prompt_file are both given: give one"),
    ],
}  # fmt: skip
ALL = [(words, line) for cases in CASES.values() for words, line in cases]

FILES = {
    "sea.txt": "".join(f"line {i}: the sea comes in, the sea goes out.\n" for i in range(80)),
    "other.txt": "Quite another text, in which JUDGES box quizzically.\n" * 20,
    "short.txt": "hello world",
    "empty.txt": "",
    "blank.txt": " \n\t\n \n ",
    "tiny.yaml": """
        {data: {path: sea.txt, batch_size: 2, eval_every: 1}, wandb: null, trainer: {max_steps: 1},
         model: {init_args: {n_layer: 1, n_head: 2, n_embd: 8, block_size: 16}}}
    """,
    "list.yaml": "- data\n- model\n",
    "broken.yaml": "data: [1, 2\nmodel: }",
    "key.yaml": "data: {bath_size: 5}",
    "type.yaml": "data:\n  batch_size: many\n",
    "null.yaml": "data: {tokenizer: null}",
    "value.yaml": "data:\n  batch_size: 0\n",
    "class.yaml": "model: ModrenLM\n",
    "group.yaml": "trainer: 5\n",
    "none.yaml": "model:\n",
    "follows.yaml": "data: {block_size: 7}\n",
    "experts.yaml": "model: {class_path: ClassicLM, init_args: {n_experts: 4}}\n",
    "place.yaml": "run_dir: run\n",
    "start.yaml": "ckpt_path: run/last.ckpt\n",
}

CHATTER = re.compile(
    r"NoneType|Namespace|Union|Traceback|<class|Parser key|argument -|Expected|Subtypes|subcommand|\berror: |\.py\b|Errno"
)
"""What no line may hold: words of the parser, of Python and of its libraries. (init_args only as typed.)"""


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with good and bad files and a trained run."""
    place = tmp_path_factory.mktemp("ground")
    for name, text in FILES.items():
        (place / name).write_text(text, "utf-8")
    (place / "latin.txt").write_bytes("café, not so".encode("latin-1"))
    (place / "utf16.txt").write_bytes("the sea".encode("utf-16"))
    (place / "folder").mkdir()
    os.mkfifo(place / "pipe")
    return place


@pytest.fixture
def here(ground: Path, minigpt: MiniGPT, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: `ground`, with its run."""
    monkeypatch.chdir(ground)
    if not (ground / "run").exists():
        assert minigpt(*shlex.split(FIT), "--run_dir", "run").status == 0
        shutil.copytree("run", "flipped")
        whole = Path("run/last.ckpt").read_bytes()
        weights = torch.load("run/last.ckpt")["state_dict"]["net.norm.weight"].numpy().tobytes()
        place = whole.index(weights)
        Path("flipped/last.ckpt").write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
        Path("truncated.ckpt").write_bytes(whole[: len(whole) // 2])
        torch.save({"state_dict": {"w": torch.ones(3)}, "epoch": 3}, "foreign.ckpt")
    return ground


def everything(place: Path) -> dict[str, tuple[int, int]]:
    """Each file and directory below a place, with its size and time."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(place.rglob("*"))}


def refused(minigpt: MiniGPT, here: Path, words: list[str]) -> str:
    """The one line that a refused command says, after `error: `."""
    before = everything(here)
    done = minigpt(*words)
    assert (done.status, done.out) == (2, ""), done.err
    assert re.fullmatch(r"error: [^\n]+\n", done.err), done.err
    assert everything(here) == before
    line = done.err.removeprefix("error: ").rstrip("\n")
    assert not CHATTER.search(line)
    assert "init_args" not in line or any("init_args" in word for word in words)
    return line


@pytest.mark.parametrize(("words", "line"), ALL, ids=[words for words, _ in ALL])
def test_a_mistake_is_said_in_one_line(minigpt: MiniGPT, here: Path, words: str, line: str) -> None:
    said = refused(minigpt, here, shlex.split(words))
    assert re.fullmatch(re.escape(line).replace(re.escape("..."), ".*"), said), said


@pytest.mark.parametrize("name", ["mps", "cuda"])
def test_a_device_that_is_not_there_is_said(minigpt: MiniGPT, here: Path, name: str) -> None:
    if AcceleratorRegistry.get(name).is_available():
        pytest.skip("it is there")
    said = refused(minigpt, here, [*shlex.split(FIT), "--trainer.accelerator", name])
    assert re.fullmatch(f"--trainer.accelerator {name}: this machine has cpu.*; auto takes the best", said)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_what_may_not_be_read_or_written_is_said(minigpt: MiniGPT, here: Path) -> None:
    shutil.copy("sea.txt", "secret.txt")
    for path, mode in ((Path("secret.txt"), 0), (Path("folder"), 0o500)):
        path.chmod(mode)
    said = refused(minigpt, here, [*shlex.split(FIT), "--data.path", "secret.txt"])
    assert said == "--data.path secret.txt cannot be read (Permission denied): name a text file"
    said = refused(minigpt, here, [*shlex.split(FIT), "--run_dir", "folder"])
    assert said == "--run_dir folder cannot be written (Permission denied): choose another"
    said = refused(minigpt, here, [*shlex.split(FIT), "--run_dir", "folder/below"])
    assert said == "--run_dir folder/below cannot be written (Permission denied): choose another"


def test_a_file_whose_reading_fails_is_said(minigpt: MiniGPT, here: Path) -> None:
    """Here root too is refused: the start of one's own memory."""
    if not Path("/proc/self/mem").exists():
        pytest.skip("no /proc here")
    said = refused(minigpt, here, [*shlex.split(FIT), "--data.path", "/proc/self/mem"])
    assert said == "--data.path /proc/self/mem cannot be read (Input/output error): name a text file"


ODD = ("", " ", "null", "~", "nan", "-inf", "0", "-1", "1.5", "1e400", "9" * 30, "true", "x", "é", "a: b", "[1, 2]", "{a: 1}", "[",
       "'", "%s", "${x}", "!!python/name:os.system", "@tiny.yaml", "tiny.yaml", "run", "\n", "-", "=", "os.system", "ModernLM")  # fmt: skip
"""Values that some setting may not expect."""


def mangled(draw: random.Random) -> list[str]:
    """A command line that works, but for one slip: in a name, a value, or the order of words."""
    words = [
        *shlex.split(FIT),
        "--run_dir",
        f"runs/{draw.random()}",
        "--trainer.max_steps",
        "1",
        "--model.n_layer",
        "1",
    ]
    known = [name for name in option_specs("fit") if name not in ("config", "print_config")]
    name, place = draw.choice([*known, *(f"trainer.{name}" for name in RESERVED)]), draw.randrange(len(words) + 1)
    slip = draw.randrange(6)
    if slip == 0:
        return [*words, f"--{name}"]
    if slip == 1:
        cut = draw.randrange(len(name))
        return [*words, f"--{name[:cut]}{name[cut + 1 :]}", draw.choice(ODD)]
    if slip == 2:
        return [*words[:place], draw.choice(ODD), *words[place:]]
    return [*words, f"--{name}={draw.choice(ODD)}"]


def slips_through(minigpt: MiniGPT, count: int, seed: int) -> list[str]:
    """Which of `count` mangled command lines do anything but work or say one line."""
    draw, wrong = random.Random(seed), []
    for _ in range(count):
        words = mangled(draw)
        try:
            done = minigpt(*words)
        except Exception as error:  # all of them are wanted
            done = Outcome(1, "", repr(error))
        one_line = re.fullmatch(r"error: [^\n]+\n", done.err) and not CHATTER.search(done.err[len("error: ") :])
        if not (done.status == 0 or done.status == 2 and one_line and not done.out):
            wrong.append(f"{words}: {done}")
    return wrong


def test_a_mangled_command_line_works_or_says_one_line(minigpt: MiniGPT, here: Path) -> None:
    assert slips_through(minigpt, 25, seed=1) == []


@pytest.mark.slow
def test_many_mangled_command_lines_work_or_say_one_line(minigpt: MiniGPT, here: Path) -> None:
    assert slips_through(minigpt, 2000, seed=2) == []


def table() -> str:
    """The mistakes in Markdown."""
    parts = [HEAD]
    for title, cases in CASES.items():
        rows = [f"| `{f'minigpt {words}'.strip()}` | {line} |" for words, line in cases]
        parts.append("\n".join([f"## {title}\n", "| input | line |", "|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def test_the_table_of_mistakes_is_the_one_in_the_docs() -> None:
    print(f"\n{table()}\n{len(ALL)} mistakes")
    assert len(ALL) >= 45
    assert PAGE.read_text("utf-8") == table(), "python tests/cli/test_bad_input.py writes it anew"


if __name__ == "__main__":
    PAGE.write_text(table(), "utf-8")
