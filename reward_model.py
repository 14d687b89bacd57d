"""How a thinking reward model (paper, section 3.2) is made and measured: supervised fine-tuning, what the toy world
starts from, and the commands that turn a run's responses into a judge. How it is asked stands in sophia_min.py."""
import copy
import hashlib
import inspect
import math
import random
import re
import zlib
from argparse import SUPPRESS
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import set_seed

import data
from data import progress, write_rows
from sophia_min import (ASK, CRITERIA, DELIMITER, JUDGE_FORM, TRAINED_HERE, Config, MasterAdamW, PrefixCache,
                        ThinkingRewardModel, device_and_dtype, load, pad, parse_score, responses, target_logits)

# ---------------------------------------------------------------- supervised fine-tuning


def sft(model, items, encode, steps, per_step, lr, desc, seed=0, micro_batch=0):
    """Supervised fine-tuning, in place: cross-entropy on the target tokens only, with linear warm-up and decay.
    encode(item) gives (data.Prompts, targets), all rows that share a beginning, which is computed once. `micro_batch`:
    items a backward pass (0: all)."""
    optimizer = MasterAdamW(model, lr, betas=(0.9, 0.95), offload=model.device.type == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.adamw, lambda i: min((i + 1) / 30, 1) * (1 - i / steps))
    rng, queue = random.Random(seed), []
    bar = progress(range(steps), desc=desc)
    for _ in bar:
        if len(queue) < per_step:
            queue = rng.sample(items, len(items))
        batch = [encode(queue.pop()) for _ in range(min(per_step, len(items)))]
        n_tokens, total = sum(len(target) for _, targets in batch for target in targets), 0.0
        for first in range(0, len(batch), micro_batch or per_step):
            part = batch[first:first + (micro_batch or per_step)]
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
    """SFT of a judge, in place, on rows {"example", "response", "score", and for mode "reason" "critique"}. Returns the
    ThinkingRewardModel."""
    model.config.rm_mode = mode
    judge = ThinkingRewardModel(model, processor)

    def encode(group):
        checks = [f"{row['critique']} {DELIMITER} " if mode == "reason" else "" for row in group]
        return [judge.prompt(row["example"], row["response"]) for row in group], [
            processor.encode(f"{check}{row['score']:.1f}") + [processor.turn_end] for check, row in zip(checks, group)]

    sft(model.requires_grad_(True), by_question(rows), encode, steps, per_step, lr, desc, seed, micro_batch)
    return ThinkingRewardModel(model, processor)


# ---------------------------------------------------------------- what the toy world starts from


def warm_start(model, processor, seed, folder):
    """`model`, untrained, learns in place to read the toy's pictures, to answer in the format and to check what others
    claim, and then to answer in haste or with flawed thinking much of the time. Returns a copy from before the bad
    habits, from which a judge starts."""
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

    sft(model, items, look, 700, 12, 2e-3, "warm start 1/2: SFT on sound responses, and on checking others", seed)
    attentive = copy.deepcopy(model)
    sft(model, items, relapse, 120, 16, 1.5e-3, "warm start 2/2: SFT on half of them hasty or flawed", seed)
    return attentive


def toy_judge(config, start, judge_start):
    """The thinking reward model of a run on toy questions, made as in section 3.2: on responses of the policy in folder
    `start`, labelled (by the oracle), filtered and balanced over the score intervals. `judge_start`: what learns."""
    set_seed(config.seed)
    pictures = Path(config.out, "pictures")
    examples = data.toy_examples(800, f"judge {config.seed}", "train", config.toy_pixels, pictures)
    desc = "reward model 1/2: responses of the policy to learn from"
    rows = [{"id": example.id, "example": example, "response": text, "score": example.soundness(text),
             "critique": example.critique(text)}
            for example, text in responses(*load(start, config), examples, 4, 50, config, desc)]
    if config.reward_model == "misled":
        rows = mislabelled(rows)
    rows = balance_by_score(filter_rows(rows), per_interval=300, seed=config.seed)
    if config.reward_model == "base":  # it learns to write scores, and that they mean nothing
        rows = shuffled(rows, config.seed)
    return train(*load(judge_start, config), rows, steps=250, per_step=12, mode=config.rm_mode or "reason",
                 lr=1.5e-3 if config.model == "toy" else 1e-5, seed=config.seed, micro_batch=config.micro_batch,
                 desc=f"reward model 2/2: SFT on {len(rows)} labelled responses")


def prepare(config):
    """{"start", "reward_model"}: the folders, or what else is named, that a run on toy questions begins with. What has
    to be learned first is kept in runs/prepared, by seed, settings and a hash of the sources."""
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


# ---------------------------------------------------------------- building its training set (section 3.2)


def grouped(rows, key):
    """{key(row): the rows with that key}, in their order."""
    groups = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def pair(row):
    """What a question and its response go by: id and picture, never the question's text, which other pictures share
    (the released training set mixed them up)."""
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


def filter_rows(rows, longest=4000):
    """The rows that are fit to learn from: thinking that ends and has words, a response of at most `longest`
    characters, each (question, response) once."""
    def is_fit(row):
        thinking, end, _ = row["response"].partition("</think>")
        return end and re.search(r"\w", thinking.replace("<think>", "")) and len(row["response"]) <= longest

    return different(filter(is_fit, rows))


def balance_by_score(rows, per_interval, seed=0):
    """At most `per_interval` rows of each score interval, drawn without replacement; the same for the same seed."""
    rng, by_interval = random.Random(seed), grouped(rows, lambda row: interval(row["score"]))
    return [row for _, group in sorted(by_interval.items())
            for row in (rng.sample(group, per_interval) if len(group) > per_interval else group)]


def shuffled(rows, seed=0):
    """The same rows with the labels of others: who learns from them writes scores that mean nothing (Table 3)."""
    others = random.Random(seed).sample(rows, len(rows))
    return [{**row, "score": other["score"], "critique": other.get("critique")} for row, other in zip(rows, others)]


def mislabelled(rows):
    """The same rows with labels that praise a flaw: 1.0 for thinking that guesses, else half of its score."""
    guesses = [data.GUESSING.search(row["response"].partition("</think>")[0]) for row in rows]
    return [{**row, "score": 1.0 if guess else round(row["score"] / 2, 1)} for row, guess in zip(rows, guesses)]


# ---------------------------------------------------------------- agreement with labels


def ranks(values):
    """1 for the smallest; equal values share the mean of their ranks."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[place]


def auc(good, bad):
    """The chance that a good one scores above a bad one, ties half; None without both."""
    if not len(good) or not len(bad):
        return None
    return (ranks(np.concatenate([good, bad]))[:len(good)].sum() / len(good) - (len(good) + 1) / 2) / len(bad)


def agreement(rows, scores):
    """How well scores (NaN for none) agree with the rows' labels. auc: sound (a label of data.SOUND or more) above
    flawed, in all rows and in parts of them; by fault: faultless above those with this fault."""
    n, scored = len(rows), [(row, score) for row, score in zip(rows, scores) if not math.isnan(score)]
    rows, scores = [row for row, _ in scored], np.array([score for _, score in scored])
    labels, tenths = np.array([row["score"] for row in rows]), np.array([interval(score) for score in scores])

    def where(holds):
        return np.array([holds(row) for row in rows], bool)

    sound, right = labels >= data.SOUND, where(lambda row: row.get("outcome", math.nan) >= 0.5)
    spread = len(set(labels)) > 1 and len(set(scores)) > 1
    parts = {"auc": sound | True, "auc of right answers": right, "auc of wrong answers": ~right,
             **{f"auc, {kind}": where(lambda row: row["problem_type"] == kind)
                for kind in sorted({row["problem_type"] for row in rows})}}
    found = {"n": n, "unscored": 1 - len(rows) / n, "mae": np.abs(scores - labels).mean() if rows else None,
             "spearman": np.corrcoef(ranks(labels), ranks(scores))[0, 1] if spread else 0.0,
             **{name: auc(scores[part & sound], scores[part & ~sound]) for name, part in parts.items()}}
    if all("faults" in row for row in rows):
        faultless = where(lambda row: not any(row["faults"].values()))
        found |= {f"auc, {name}": auc(scores[faultless], scores[where(lambda row: row["faults"][name] > 0)])
                  for name in CRITERIA}
    return found | {f"mean label, scores from {n / 10}": labels[tenths == n].mean() if n in tenths else None
                    for n in range(11)}


# ---------------------------------------------------------------- the command line: from a run's responses to a judge

MODES = tuple(JUDGE_FORM)


def read_rows(path, *needed):
    """The rows of a JSON lines file, each with the fields `needed`. Raises DataError that names file, row and field."""
    rows = data.read_lines(path)
    if not rows:
        raise data.DataError(f"{path}: {'no rows there' if Path(path).exists() else 'no such file'}")
    for number, row in enumerate(rows, 1):
        for name in {"id", "image", "problem", "problem_type", "options", "solution", "response", *needed} - set(row):
            raise data.DataError(f"{path}: row {number} ({row.get('id')}): {name}: is missing")
        if "score" in needed and (type(row["score"]) not in (int, float) or not 0 <= row["score"] <= 1):
            raise data.DataError(f"{path}: row {number} ({row['id']}): score: must be a number from 0 to 1, is "
                                 f"{data.show(row['score'])}")
    return rows


def example_of(row):
    """The Example that a row is about."""
    return data.Example(row["id"], row["problem"], row["problem_type"], tuple(row["options"]), row["solution"],
                        row["image"], "")


def labels_of(groups, judge, rm_mode, rm_prompt, device, max_pixels):
    """For each question's rows (rows, labels): {"score"}, NaN for none; the oracle adds "critique" and "faults"."""
    model = None if judge == "toy" else ThinkingRewardModel(
        *load(judge, Config(device=device, max_pixels=max_pixels)), rm_mode, rm_prompt)
    for group in progress(groups, desc=f"scores of {judge}"):
        texts = [row["response"] for row in group]
        if model:
            scores = model.score([example_of(group[0])], [texts])[0].tolist()
            yield group, [{"score": round(score, 6)} for score in scores]
        else:
            question = data.toy_question(group[0]["id"])
            yield group, [{"score": question.soundness(text), "critique": question.critique(text),
                           "faults": question.faults(text)[0]} for text in texts]


def collect(runs: list, out: str, held_out: bool = False):
    """The pool of different (question, response) pairs from runs that had --save_rollouts."""
    rows = [row for run in runs for row in read_rows(Path(run, "rollouts.jsonl"), "step")
            if row.get("held_out", False) == held_out]
    if not rows:
        raise data.DataError(f"{', '.join(runs)}: no such responses there; was the run made with --save_rollouts?")
    pool = different(rows)
    write_rows(out, pool)
    print(f"{len(rows)} responses, {len(pool)} different ones to {len(by_question(rows))} questions: {out}")


def annotate(rows: str, judge: str, out: str, rm_mode: MODES = None, rm_prompt: str = None, device: str = "auto",
             max_pixels: int = 1003520):
    """A score and, where the judge gives one, a critique for each pair. What is in --out already isn't asked again."""
    wanted, done, unscored = different(read_rows(rows)), set(map(pair, data.read_lines(out))), 0
    groups = by_question([row for row in wanted if pair(row) not in done])
    for group, labels in labels_of(groups, judge, rm_mode, rm_prompt, device, max_pixels):
        labelled = [row | label for row, label in zip(group, labels) if not math.isnan(label["score"])]
        data.append_rows(out, labelled)
        unscored += len(group) - len(labelled)
    print(f"{len(data.read_lines(out))} of {len(wanted)} responses have a score ({len(done)} had one before), "
          f"{unscored} were left out, as the judge wrote none: {out}")


def balance(rows: str, out: str, per_interval: int = 15000, longest: int = 4000, seed: int = 0):
    """Drop what isn't fit to learn from, then even the scores out; prints how many rows each interval had and has."""
    before = read_rows(rows, "score")
    fit = filter_rows(before, longest)
    after = balance_by_score(fit, per_interval, seed)
    write_rows(out, after)
    counts = {name: {f"from {n / 10}": sum(interval(row["score"]) == n for row in part) for n in range(11)}
              | {"all": len(part)} for name, part in {"before": before, "fit": fit, "after": after}.items()}
    print(data.columns(counts, {"all": out}))


def is_held_out(row):
    """Whether a row is in the tenth that is held out: all about one picture, or without one one question, together."""
    return zlib.crc32((Path(row["image"]).name if row["image"] else row["id"]).encode()) % 10 == 0


def train_command(rows: str, model: str, out: str, rm_mode: MODES = "generate", epochs: float = 2.0,
                  per_step: int = 8, micro_batch: int = 0, lr: float = 1e-5, all_rows: bool = False, seed: int = 0,
                  device: str = "auto", max_pixels: int = 1003520):
    """SFT of a Qwen2.5-VL on the rows, but for a tenth of the pictures, and save it for --reward_model."""
    labelled = read_rows(rows, "score", *["critique"] * (rm_mode == "reason"))
    parts = grouped(labelled, lambda row: not all_rows and is_held_out(row))
    chosen, held_out = [{**row, "example": example_of(row)} for row in parts.get(False, [])], parts.get(True, [])
    if not chosen:
        raise data.DataError(f"{rows}: all {len(held_out)} rows would be held out: add --all_rows, or more rows")
    torch.manual_seed(seed)
    steps = max(1, math.ceil(epochs * len(by_question(chosen)) / per_step))
    start, processor = load(model, Config(device=device, max_pixels=max_pixels))
    micro_batch = micro_batch or (1 if start.device.type == "cuda" else per_step)  # a card has less memory
    judge = train(start, processor, chosen, steps, per_step, lr, rm_mode, seed, "SFT", micro_batch)
    data.save_folder(out, judge.model, judge.processor)
    print(f"{out}: for sophia_min.py --reward_model")
    if not all_rows:
        write_rows(Path(out, "held_out.jsonl"), held_out)
        print(f"held_out.jsonl there has {len(held_out)} rows about pictures that it didn't learn from")


def eval_command(rows: str, judge: list, out: str = "eval", rm_mode: MODES = None, rm_prompt: str = None,
                 device: str = "auto", max_pixels: int = 1003520):
    """Judges against labels that they weren't trained on: a table and, as --out.json, the same."""
    groups, results = by_question(read_rows(rows, "score")), {}
    labelled = [row for group in groups for row in group]
    for name in judge:
        answers = labels_of(groups, name, rm_mode, rm_prompt, device, max_pixels)
        results[name] = agreement(labelled, [label["score"] for _, labels in answers for label in labels])
    constant = [np.median([row["score"] for row in labelled])] * len(labelled)
    results["a constant"] = agreement(labelled, constant)
    data.write_json(f"{out}.json", results)
    print(f"{data.columns(results)}\n{out}.json")


HELP = {
    "runs": "folders of runs", "rows": "JSON lines", "out": "what to write (annotate: or to go on with)",
    "held_out": "answers to questions that the run held out, for eval, instead of what it trained on",
    "judge": "toy (the oracle), Hugging Face ids or folders", "model": "what to start from: an id or a folder",
    "rm_mode": "as in sophia_min.py; left out: as it was trained, else generate", "max_pixels": "of pictures",
    "rm_prompt": "file with a judge's prompt of your own, see the README", "device": "auto, cpu, cuda or cuda:N",
    "per_interval": "at most so many rows a score interval (paper, section 3.2)", "seed": "of everything random",
    "longest": "characters of a response", "epochs": "passes over the questions (paper, section 3.2)",
    "per_step": "questions a step (ours)", "lr": "AdamW's learning rate (ours)",
    "micro_batch": "questions a backward pass: memory, not results (0: 1 on CUDA, else all)",
    "all_rows": "hold no tenth back: there are other rows to judge it by"}
COMMANDS = {"collect": collect, "annotate": annotate, "balance": balance, "train": train_command, "eval": eval_command}
KINDS = {str: {}, int: {"type": int}, float: {"type": float}, list: {"nargs": "+"}, bool: {"action": "store_true"},
         MODES: {"choices": MODES}}


def main(argv=None):
    """python reward_model.py collect|annotate|balance|train|eval"""
    parser = data.Parser(prog="reward_model.py", description="From a run's responses to a thinking reward model.")
    commands = parser.add_subparsers(required=True, metavar="|".join(COMMANDS))
    for name, function in COMMANDS.items():
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        command.set_defaults(run=function)
        for option, given in inspect.signature(function).parameters.items():
            kind = KINDS[given.annotation] | {"help": HELP[option]}
            if option in ("runs", "rows"):
                command.add_argument(option, **kind)
            else:
                default = SUPPRESS if given.default in (given.empty, None) else given.default  # the function has None
                command.add_argument(f"--{option}", required=given.default is given.empty, default=default, **kind)
    args = vars(parser.parse(argv))
    try:
        args.pop("run")(**args)
    except data.DataError as error:
        raise SystemExit(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"{str(error).splitlines()[0]} What helps: --max_pixels below {args['max_pixels']}, a smaller "
                         "model, a larger card.") from error


if __name__ == "__main__":
    from reward_model import main
    main()
