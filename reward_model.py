"""How a thinking reward model (paper, section 3.2) is made and measured, and what the toy world starts from."""
import copy
import hashlib
import inspect
import math
import random
import re
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import set_seed

import data
from data import progress, write_rows
from sophia_min import (ASK, DELIMITER, JUDGE_FORM, TRAINED_HERE, Config, MasterAdamW, PrefixCache,
                        ThinkingRewardModel, device_and_dtype, load, pad, parse_score, responses, target_logits)

# -------- supervised fine-tuning

def sft(model, items, encode, steps, per_step, lr, desc, seed=0, micro_batch=0):
    """Supervised fine-tuning, in place, of target tokens. encode(item) gives (data.Prompts, targets), rows that share a
    beginning, computed once. `micro_batch`: items a backward pass (0: all)."""
    micro_batch = micro_batch or per_step
    optimizer = MasterAdamW(model, lr, betas=(0.9, 0.95), offload=model.device.type == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.adamw, lambda i: min((i + 1) / 30, 1) * (1 - i / steps))
    rng, queue = random.Random(seed), []
    bar = progress(range(steps), desc=desc)
    for _ in bar:
        if len(queue) < per_step:
            queue = rng.sample(items, len(items))
        batch = [encode(queue.pop()) for _ in range(min(per_step, len(items)))]
        n_tokens, total = sum(len(target) for _, targets in batch for target in targets), 0.0
        for first in range(0, len(batch), micro_batch):
            part = batch[first:first + micro_batch]
            targets = [target for _, rows in part for target in rows]
            prefix, (labels, mask) = PrefixCache(model, [prompts for prompts, _ in part]), pad(targets, "right")
            logits = target_logits(model, prefix, torch.arange(len(targets)), targets)  # [n, T, V]
            logits = logits[mask.to(model.device) == 1].float()  # [tokens, V]
            loss = F.cross_entropy(logits, labels[mask == 1].to(logits.device), reduction="sum") / n_tokens
            loss.backward()
            total += loss.item()
        optimizer.step(max_norm=1.0)
        schedule.step()
        bar.set_postfix(loss=f"{total:.3f}")

def train(model, processor, rows, steps, per_step, lr, mode="generate", seed=0, desc="reward model", micro_batch=0):
    """SFT of a judge, in place, on rows {"example", "response", "score", and for mode "reason" "critique"}."""
    model.config.rm_mode = mode
    judge = ThinkingRewardModel(model, processor)

    def encode(group):
        checks = [f"{row['critique']} {DELIMITER} " if mode == "reason" else "" for row in group]
        return [judge.prompt(row["example"], row["response"]) for row in group], [
            processor.encode(f"{check}{row['score']:.1f}") + [processor.turn_end] for check, row in zip(checks, group)]

    sft(model.requires_grad_(True), by_question(rows), encode, steps, per_step, lr, desc, seed, micro_batch)
    return ThinkingRewardModel(model, processor)

# -------- what the toy world starts from

def warm_start(model, processor, seed, folder):
    """`model`, untrained, learns in place to read the toy's pictures, to answer in the format and to check what others
    claim, and then bad habits. Returns a copy from before these, from which a judge starts."""
    rng, eos = random.Random(f"warm start {seed}"), [processor.turn_end]
    items = list(zip(data.toy_examples(3000, seed, folder=folder), data.toy_questions(3000, seed)))

    def look(item):  # write a sound response, and check a flawed one: two rows that begin alike
        example, question = item
        flawed = question.response(rng, rng.choice(data.FLAWS))
        checking = processor.chat([("system", data.SYSTEM_PROMPT), ("user", data.PICTURE, data.question_text(example)),
                                   ("assistant", flawed), ("user", ASK)], example.image)
        return [processor.question(example), checking], [
            processor.encode(text) + eos for text in (question.response(rng), question.critique(flawed))]

    def relapse(item):
        example, question = item
        return [processor.question(example)] * 2, [
            processor.encode(question.response(rng, question.habit(rng))) + eos for _ in range(2)]

    sft(model, items, look, 800, 12, 2e-3, "warm start 1/2: SFT on sound responses, on checking others", seed)
    attentive = copy.deepcopy(model)
    sft(model, items, relapse, 120, 16, 1.5e-3, "warm start 2/2: SFT on half of them hasty or flawed", seed)
    return attentive

def toy_judge(config, start, judge_start):
    """The judge of a run on toy questions, made as in section 3.2: on responses of the policy in folder `start`,
    labelled (by the oracle), filtered and balanced. `judge_start`: what learns."""
    set_seed(config.seed)
    pictures = Path(config.out, "pictures")
    examples = data.toy_examples(800, f"judge {config.seed}", "train", config.toy_pixels, pictures)
    desc = "reward model 1/2: responses to learn from"
    rows = [{"id": example.id, "example": example, "response": text, "score": example.soundness(text),
             "critique": example.critique(text)}
            for example, text in responses(*load(start, config), examples, 4, 50, config, desc)]
    if config.reward_model == "misled":
        rows = mislabelled(rows)
    rows = balance_by_score(filter_rows(rows), per_interval=300, seed=config.seed)
    if config.reward_model == "base":
        rows = shuffled(rows, config.seed)
    return train(*load(judge_start, config), rows, steps=250, per_step=12, mode=config.rm_mode or "reason",
                 lr=1.5e-3 if config.model == "toy" else 1e-5, seed=config.seed, micro_batch=config.micro_batch,
                 desc=f"reward model 2/2: SFT on {len(rows)} responses")

def prepare(config):
    """{"start", "reward_model"}: what a run on toy questions begins with. What must be learned first is kept in
    runs/prepared, by seed, settings and a hash of the sources."""
    sources = "".join(Path(data.__file__).with_name(f"{name}.py").read_text()
                      for name in ("data", "sophia_min", "reward_model"))

    def folder_of(name, *settings):
        key = hashlib.sha256(repr((sources, config.seed, *settings)).encode()).hexdigest()[:12]
        return Path("runs", "prepared", f"{name}_{config.seed}_{key}")

    names = {"start": config.model, "reward_model": config.reward_model}
    judge_start = config.model
    if config.model == "toy":
        root = folder_of("toy")
        names["start"], judge_start = str(root / "start"), str(root / "attentive")
        if not Path(names["start"]).exists():
            model, processor = data.toy_model(config.seed)
            model, pictures = model.to(device_and_dtype(config)[0]), Path(config.out, "pictures")
            attentive = warm_start(model, processor, config.seed, pictures)
            data.save_folder(judge_start, attentive, processor)
            data.save_folder(names["start"], model, processor)  # last: with it all is there
    if config.reward_model in TRAINED_HERE and not config.eval_only:
        changed = Path(config.model).stat().st_mtime_ns if Path(config.model).exists() else None
        folder = folder_of(config.reward_model, config.reward_model, config.model, changed, config.rm_mode,
                           config.toy_pixels, config.max_pixels, config.temperature, config.max_new_tokens,
                           config.min_new_tokens)
        names["reward_model"] = str(folder)
        if not folder.exists():
            judge = toy_judge(config, names["start"], judge_start)
            data.save_folder(folder, judge.model, judge.processor)
    return names

# -------- building its training set (section 3.2)

def grouped(rows, key):
    """{key(row): the rows with that key}."""
    groups = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups

def pair(row):
    """What a response goes by: its question's id and picture, and its text."""
    return row["id"], row.get("image"), row["response"]

def by_question(rows):
    """Lists of rows of one question (and picture) each."""
    return list(grouped(rows, lambda row: pair(row)[:2]).values())

def different(rows):
    """The first row of each pair."""
    return [group[0] for group in grouped(rows, pair).values()]

def interval(score):
    """0 for [0, 0.1) .. 9 for [0.9, 1), 10 for 1.0. By rounding: int(0.3 / 0.1) is 2."""
    return int(round(score * 10, 6))

def filter_rows(rows):
    """The rows to learn from: thinking that ends and has words, at most 4,000 characters, each pair once."""
    fit = []
    for row in rows:
        thinking, end, _ = row["response"].partition("</think>")
        if end and re.search(r"\w", thinking.replace("<think>", "")) and len(row["response"]) <= 4000:
            fit.append(row)
    return different(fit)

def balance_by_score(rows, per_interval, seed=0):
    """At most `per_interval` rows of each score interval, without replacement; the same for the same seed."""
    rng, by_interval = random.Random(seed), grouped(rows, lambda row: interval(row["score"]))
    return [row for _, group in sorted(by_interval.items())
            for row in (rng.sample(group, per_interval) if len(group) > per_interval else group)]

def shuffled(rows, seed):
    """The rows with others' labels: scores learned from them mean nothing (Table 3)."""
    others = random.Random(seed).sample(rows, len(rows))
    return [{**row, "score": other["score"], "critique": other["critique"]} for row, other in zip(rows, others)]

def mislabelled(rows):
    """The rows with labels that praise haste: 1.0 for thinking that guesses, else half."""
    guesses = [data.GUESSING.search(row["response"].partition("</think>")[0]) for row in rows]
    return [{**row, "score": 1.0 if guess else round(row["score"] / 2, 1)} for row, guess in zip(rows, guesses)]

# -------- agreement with labels

def ranks(values):
    """1 for the smallest; equal values share the mean of their ranks."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[place]

def auc(good, bad):
    """The chance that a good one scores above a bad one, ties half; None without both."""
    if not len(good) or not len(bad):
        return None
    return (np.greater.outer(good, bad) + np.equal.outer(good, bad) / 2).mean()

def agreement(rows, scores):
    """How well scores (NaN: none) agree with the rows' labels. auc: sound, data.SOUND or more, above flawed."""
    scored = [(row, score) for row, score in zip(rows, scores) if not math.isnan(score)]
    labels, scores = [row["score"] for row, _ in scored], [score for _, score in scored]
    spread = min(len(set(labels)), len(set(scores))) > 1
    found = {"n": len(rows), "unscored": 1 - len(scored) / len(rows),
             "spearman": np.corrcoef(ranks(labels), ranks(scores))[0, 1] if spread else 0.0}
    for kind in ("", *sorted({row["problem_type"] for row in rows})):
        part = [(row["score"], score) for row, score in scored if kind in ("", row["problem_type"])]
        found[f"auc, {kind}" if kind else "auc"] = auc([score for label, score in part if label >= data.SOUND],
                                                       [score for label, score in part if label < data.SOUND])
    return found

# -------- the command line: from a run's responses to a judge

MODES = tuple(JUDGE_FORM)

def read_rows(path, *needed):
    """The rows of a JSON lines file, with the fields `needed`; else DataError, naming file, row and field."""
    rows = data.read_lines(path)
    if not rows:
        raise data.DataError(f"{path}: no rows there")
    for number, row in enumerate(rows, 1):
        there = f"{path}: row {number} ({row.get('id')})"
        for name in {"id", "image", "problem", "problem_type", "options", "solution", "response", *needed} - set(row):
            raise data.DataError(f"{there}: {name}: is missing")
        if "score" in needed and (type(row["score"]) not in (int, float) or not 0 <= row["score"] <= 1):
            raise data.DataError(f"{there}: score: {data.show(row['score'])} isn't a number from 0 to 1")
    return rows

def example_of(row):
    """The Example that a row is about."""
    return data.Example(row["id"], row["problem"], row["problem_type"], tuple(row["options"]), row["solution"],
                        row["image"], "")

def labels_of(groups, judge, rm_mode, rm_prompt):
    """The labels of each question's rows: {"score"}, NaN for none; the oracle adds "critique"."""
    model = None if judge == "toy" else ThinkingRewardModel(*load(judge, Config()), rm_mode, rm_prompt)
    for group in progress(groups, desc=f"scores of {judge}"):
        texts = [row["response"] for row in group]
        if model:
            scores = model.score([example_of(group[0])], [texts])[0].tolist()
            yield [{"score": round(score, 6)} for score in scores]
        else:
            question = data.toy_question(group[0]["id"])
            yield [{"score": question.soundness(text), "critique": question.critique(text)} for text in texts]

def collect(runs: list, out: str, held_out: bool = False):
    """The different (question, response) pairs of runs with --save_rollouts; --held_out: those never trained on."""
    rows = [row for run in runs for row in read_rows(Path(run, "rollouts.jsonl"))
            if row.get("held_out", False) == held_out]
    pool = different(rows)
    write_rows(out, pool)
    print(f"{len(rows)} responses, {len(pool)} different ones to {len(by_question(rows))} questions: {out}")

def annotate(rows: str, judge: str, out: str, rm_mode: MODES = None, rm_prompt: str = None):
    """A score for each pair by a judge: toy (the oracle), an id or a folder. What --out has isn't asked again."""
    wanted, done = different(read_rows(rows)), set(map(pair, data.read_lines(out)))
    groups = by_question([row for row in wanted if pair(row) not in done])
    for group, labels in zip(groups, labels_of(groups, judge, rm_mode, rm_prompt)):
        data.append_rows(out, [row | label for row, label in zip(group, labels) if not math.isnan(label["score"])])
    print(f"{len(data.read_lines(out))} of {len(wanted)} responses have a score ({len(done)} had one before): {out}")

def balance(rows: str, out: str, per_interval: int = 15000, seed: int = 0):
    """Drop what isn't fit to learn from, then keep at most --per_interval rows of each score interval."""
    labelled = read_rows(rows, "score")
    fit = filter_rows(labelled)
    even = balance_by_score(fit, per_interval, seed)
    write_rows(out, even)
    print(f"{len(labelled)} rows, {len(fit)} of them fit to learn from, {len(even)} balanced: {out}")

def is_held_out(row):
    """Whether a row is in the held-out tenth of pictures, or of questions without."""
    return zlib.crc32((Path(row["image"]).name if row["image"] else row["id"]).encode()) % 10 == 0

def train_command(rows: str, model: str, out: str, rm_mode: MODES = "generate", epochs: float = 2.0,
                  per_step: int = 8, lr: float = 1e-5, all_rows: bool = False, seed: int = 0):
    """SFT of a Qwen2.5-VL on the rows, --per_step questions a step, and save it for --reward_model. It holds back a
    tenth of the pictures, in held_out.jsonl, but for --all_rows."""
    labelled = read_rows(rows, "score", *["critique"] * (rm_mode == "reason"))
    chosen = [row | {"example": example_of(row)} for row in labelled if all_rows or not is_held_out(row)]
    if not chosen:
        raise data.DataError(f"{rows}: all {len(labelled)} rows would be held out: add --all_rows, or more rows")
    steps = max(1, math.ceil(epochs * len(by_question(chosen)) / per_step))
    start, processor = load(model, Config())
    micro_batch = 1 if start.device.type == "cuda" else per_step  # a card has less memory
    judge = train(start, processor, chosen, steps, per_step, lr, rm_mode, seed, "SFT", micro_batch)
    data.save_folder(out, judge.model, judge.processor)
    print(f"{out}: learned from {len(chosen)} of {len(labelled)} rows; for sophia_min.py --reward_model")
    if not all_rows:
        write_rows(Path(out, "held_out.jsonl"), filter(is_held_out, labelled))

def eval_command(rows: str, judge: list, out: str, rm_mode: MODES = None, rm_prompt: str = None):
    """How judges agree with labels that they weren't trained on: a table and, as --out.json, the same."""
    groups, results = by_question(read_rows(rows, "score")), {}
    labelled = [row for group in groups for row in group]
    for name in judge:
        scores = [label["score"] for labels in labels_of(groups, name, rm_mode, rm_prompt) for label in labels]
        results[name] = agreement(labelled, scores)
    data.write_json(f"{out}.json", results)
    print(f"{data.columns(results)}\n{out}.json")

COMMANDS = {"collect": collect, "annotate": annotate, "balance": balance, "train": train_command, "eval": eval_command}
KINDS = {list: {"nargs": "+"}, bool: {"action": "store_true"}, MODES: {"choices": MODES}}

def main(argv=None):
    """python reward_model.py collect|annotate|balance|train|eval"""
    parser = data.Parser(prog="reward_model.py", description="From a run's responses to a thinking reward model.")
    commands = parser.add_subparsers(required=True, metavar="|".join(COMMANDS))
    for name, function in COMMANDS.items():
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        command.set_defaults(run=function)
        for option, given in inspect.signature(function).parameters.items():
            kind = KINDS.get(given.annotation, {"type": given.annotation})
            if option in ("runs", "rows"):
                command.add_argument(option, **kind)
            elif given.default is given.empty:
                command.add_argument(f"--{option}", required=True, **kind)
            else:
                command.add_argument(f"--{option}", default=given.default, help="%(default)s by default", **kind)
    args = vars(parser.parse_args(argv))
    try:
        args.pop("run")(**args)
    except (data.DataError, torch.OutOfMemoryError) as error:
        raise SystemExit(str(error).splitlines()[0]) from error

if __name__ == "__main__":
    main()
