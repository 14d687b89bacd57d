"""What goes into sophia_min and what comes out."""
import base64
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import string
import struct
import sys
import tempfile
import unicodedata
import zipfile
import zlib
from argparse import RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from html.entities import html5
from pathlib import Path
from reprlib import repr as show  # any value on one short line, nesting cut: a row may hold anything
from statistics import fmean, stdev

import numpy as np
import torch
from jinja2 import Template, TemplateError
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig, HfArgumentParser,
                          PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import cached_file, is_flash_attn_2_available

# Under torchrun each process computes its share; rank 0 alone writes and shows.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
progress = functools.partial(tqdm, disable=RANK > 0)
# what libraries raise on odd files
DAMAGE = (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError, SyntaxError, EOFError,
          ArithmeticError, struct.error, zlib.error, zipfile.BadZipFile, pickle.PickleError, SafetensorError,
          TemplateError, Image.DecompressionBombError)

# the paper's Table 4, as sophia_min.CRITERIA asks for them
FAULTS = ("logical soundness", "correct reasoning", "error identification", "language consistency", "redundancy")

# -------- the command line

class Parser(HfArgumentParser):
    """Flags from a dataclass; an error is one line."""

    def __init__(self, *dataclasses, **more):
        super().__init__(*dataclasses, **{"formatter_class": RawDescriptionHelpFormatter} | more)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; --help lists all\n")

    def parse(self, argv, **defaults):
        """What the command line says, over other defaults than the dataclass's own."""
        self.set_defaults(**defaults)
        parsed, *_, unknown = self.parse_args_into_dataclasses(argv, True, look_for_args_file=False)
        if unknown:
            self.error(f"{unknown[0]}: there is no such option")
        return parsed

    def settings(self, argv, toy):
        """(settings, those of the run to --resume or {}). `toy`: other defaults with --model toy."""
        for action in self._actions:
            action.metavar = {int: "N", float: "X", str: "NAME"}.get(action.type)
            if action.dest in toy:
                action.help = f"{action.help[:-1]}; {toy[action.dest]} with --model toy)"
        first, before = self.parse_known_args(argv)[0], {}
        defaults, base = dict(toy) if first.model == "toy" else {}, adapter_base(first.model)
        if first.lora or first.adapter or base:
            defaults["lr"] = round(10 * defaults.get("lr", self.get_default("lr")), 9)  # ours
        if first.resume:
            try:
                before = json.loads(Path(first.resume, "config.json").read_text())
                for name in ("eval.json", "checkpoint/state.pt"):
                    Path(first.resume, name).stat()
                if set(before) != set(vars(first)):
                    raise ValueError("config.json is another version's")
            except (OSError, ValueError, TypeError) as error:
                self.error(f"--resume {first.resume}: no run to continue, start one in another --out: {error}")
            defaults = before = before | {"resume": first.resume, "out": first.resume}
        config = self.parse(argv, **defaults)
        if base and not before:  # an adapter's folder names its base
            config.model, config.adapter = base, config.model
        for name, value in before.items():
            if getattr(config, name) != value:
                print(f"--{name} was {value}, goes on as {getattr(config, name)}")
        return config, before

class StopAfterStep:
    """For `with`: Ctrl-C asks for an end after the step; a second one ends at once."""
    asked, before = False, None

    def __enter__(self):
        with suppress(ValueError):  # off the main thread Python allows no handler
            self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_):
        if self.before:
            signal.signal(signal.SIGINT, self.before)

    def _ask(self, *_):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)

# -------- rows and pictures

PROBLEM_TYPES = ("numerical", "multiple choice", "OCR", "free-form", "text")  # paper, section 3.1

PICTURE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow has more: an .eps starts Ghostscript
# how a whole file ends; a WEBP tells its length when it is opened
PICTURE_END = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b"\0;", "WEBP": b""}
TURN = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE,
        6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90}  # EXIF orientation -> upright

class DataError(ValueError):
    """Something is wrong with the user's data; the message says what, where, and what next."""

@dataclass(frozen=True)
class Example:
    """One question of the training set, checked."""
    id: str
    problem: str
    problem_type: str
    options: tuple[str, ...]
    solution: str  # without <answer> tags
    image: str | None  # a path
    source: str
    soundness: Callable[[str], float] | None = field(default=None, compare=False, repr=False)
    critique: Callable[[str], str] | None = field(default=None, compare=False, repr=False)

@contextmanager
def _pillow(path):
    """An opened picture, if Pillow shows its pixels as a person sees them; else DataError."""
    try:  # a stream, since Pillow maps a named TIFF into memory with its sides swapped
        with open(path, "rb") as file, Image.open(file, formats=PICTURE_FORMATS) as picture:
            tags = getattr(picture, "tag_v2", {})  # a TIFF's; 258: bits of a sample, 262: is 0 white
            if (picture.mode in ("I", "F") or picture.mode[0] == "I" and (tags.get(258, (16,)), tags.get(262, 1)) != (
                    (16,), 1) or "transparency" in picture.info and picture.tile[0].args in (
                    "L;2", "L;4", "I;16B", "RGB;16B")):
                raise ValueError(f"unusual {picture.format}, {picture.mode}")
            yield picture
    except DAMAGE as error:
        raise DataError(f"path: {str(path)!r} can't be read as a picture, save it as 8-bit PNG or JPEG: {error!r}"
                        ) from error

def open_picture(path):
    """The picture as a person sees it: RGB, upright (EXIF), white where transparent, the first frame. DataError, naming
    the file, if it can't be decoded, or not for sure."""
    with _pillow(path) as picture:
        if picture.format == "PNG":
            picture.verify()  # its checksums: 3% of the time that decoding takes
    with _pillow(path) as picture:
        picture.load()
        turn = None
        with suppress(SyntaxError):  # unreadable EXIF: as stored, as in a viewer; exif_transpose dies of any odd tag
            turn = TURN.get(picture.getexif().get(0x112))
        if picture.mode[0] == "I":  # 16 bits, where convert("RGB") would clip at 255; 8-bit values stay as they are
            values = np.asarray(picture).astype(float)
            picture = Image.fromarray((values / (257 if values.max() > 255 else 1)).round().astype(np.uint8))
        elif picture.has_transparency_data and not (picture.format == "BMP" and picture.getextrema()[3] == (0, 0)):
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("RGB")
        return picture if turn is None else picture.transpose(turn)

def check_picture(root, name, max_aspect=200, max_image_pixels=100_000_000):
    """The real path of a row's picture in the folder `root`; DataError if training couldn't use it."""
    file = os.path.realpath(os.path.join(root, name))  # a link could lead anywhere
    is_inside = not os.path.isabs(name) and ".." not in name.split("/") and file.startswith(os.path.join(root, ""))
    if not is_inside or not os.path.isfile(file):
        raise DataError(f"path: no file {name!r} inside {root!r} (no absolute path, no '..', no link out of it)")
    with _pillow(file) as picture:
        width, height = picture.size
        picture.fp.seek(-8, os.SEEK_END)  # the smallest file that Pillow opens, a PPM, has 8 bytes
        is_whole = picture.fp.read().endswith(PICTURE_END.get(picture.format, ()))
    if width * height > max_image_pixels or max(width, height) > max_aspect * min(width, height):
        raise DataError(f"path: {name!r} has {width} x {height} pixels: more than {max_image_pixels:,}, or an aspect "
                        f"ratio above {max_aspect}")  # before it is decoded: 18 KB can hold 144 megapixels
    if not is_whole:  # truncated, or with a camera's own data behind its end: decode it to be sure
        open_picture(file)
    return file

def load_examples(path, image_root=None, *, skip_bad=False, skipped_path=None, **limits):
    """The Examples of a file of rows in the paper's format (section 3.1); limits: check_picture's. A bad row is a
    DataError or, with skip_bad, left out and listed in skipped_path (default: skipped.jsonl beside the file)."""
    path, examples, bad, ids = Path(path), [], [], {}
    root, by_line = os.path.realpath(path.parent if image_root is None else image_root), path.suffix.lower() == ".jsonl"
    if path.suffix.lower() not in (".json", ".jsonl"):
        raise DataError(f"{path}: must be one .json or .jsonl file")
    try:
        text = path.read_bytes().decode("utf-8-sig")  # with or without a byte order mark
        rows = text.split("\n") if by_line else json.loads(text)  # splitlines cuts at U+2028
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: is no JSON in UTF-8 (with a row a line, call it .jsonl): {error}") from error
    find_picture = functools.cache(functools.partial(check_picture, root, **limits))  # many questions share a picture
    rows = progress(rows if isinstance(rows, list) else [], desc="checking rows", delay=1, leave=False)
    for number, row in enumerate(rows, 1):
        try:
            if not by_line or row.strip():
                row = json.loads(row) if by_line else row
                examples.append(_check_row(row, number, ids, find_picture))
        except (ValueError, RecursionError) as error:  # a DataError, or broken JSON
            name = show(row["problem_id"]) if isinstance(row, dict) and "problem_id" in row else "no id"
            bad.append({"reason": f"{path}: row {number} ({name}): {error}", "row": row})
    if not examples and not bad:
        raise DataError(f"{path}: is empty, or no list of rows")
    _leave_out(path, bad, examples, skip_bad, skipped_path or path.with_name("skipped.jsonl"))
    return examples

def _leave_out(path, bad, kept, skip_bad, listed, before=()):
    """Bad rows, {"reason", ..}, are told in a DataError or, with skip_bad, listed in the file `listed`."""
    count = f"{len(bad)} of {len(bad) + len(kept)} rows"
    if bad and not (skip_bad and kept):
        raise DataError("\n".join([f"{path}: {count} are bad, the first of them:", *(row["reason"] for row in bad[:20]),
                                   "Correct them, or leave them out with --skip_bad."]))
    if bad:
        try:
            write_rows(listed, [*before, *bad])
        except OSError as error:
            raise DataError(f"the list of bad rows can't be written: {error}") from error
        print(f"{path}: left out {count}, listed in {listed}")

def _text(row, name):
    value = row.get(name)
    if not isinstance(value, str) or not value.strip() or re.search("[\0\ud800-\udfff]", value):
        found = show(value) if name in row else f"missing; the row has {list(row)!r:.200}"
        raise DataError(f"{name}: must be text, without a zero byte or a lone surrogate, is {found}")
    return value

def _check_row(row, number, ids, find_picture):
    """One row as an Example; DataError, "field: what is wrong", at its first fault."""
    if not isinstance(row, dict):
        raise DataError(f"row: must be an object with the paper's fields, is {show(row)}")
    id = str(row["problem_id"]) if type(row.get("problem_id")) is int else _text(row, "problem_id")  # true: no int
    kind, data_type, problem, truth = [_text(row, f) for f in ("problem_type", "data_type", "problem", "solution")]
    if tagged := re.search("(?is)<answer>(.*)</answer>", truth):
        truth = tagged[1]
    truth, chooses, has_picture = truth.strip(), kind == "multiple choice", data_type == "image"
    options = [] if row.get("options") is None else row["options"]  # exports write null for an empty list
    if not isinstance(options, list):
        raise DataError(f"options: must be a list, is {show(options)}")
    options = [_text({"options": option}, "options").strip() for option in options]
    for wrong, reason in [
            (ids.setdefault(id, number) != number, f"problem_id: row {ids[id]} has it already"),
            (kind not in PROBLEM_TYPES, f"problem_type: must be one of {', '.join(PROBLEM_TYPES)}"),
            (data_type not in ("image", "text"), "data_type: must be one of image, text"),
            (problem.count("<image>") > has_picture, "problem: has more <image> tags than pictures"),
            (not visible(truth) or re.search("(?i)</?(answer|think)>", truth), "solution: must hold one answer"),
            # where the truth, as an answer, wouldn't earn 1, no answer could (words always equal themselves)
            (kind == "numerical" and len(truth) > LONGEST, f"solution: no number has more than {LONGEST} characters"),
            (chooses and len(set(options)) < max(2, len(options)), "options: must be two or more, all different"),
            (chooses and not chosen_options(truth, options), "solution: is none of the options, or not only one"),
            (row.get("path") and not has_picture, "path: must be empty, since data_type is text")]:
        if wrong:
            raise DataError(f"{reason}, is {show(row.get(reason.partition(':')[0]))}")
    image = find_picture(_text(row, "path")) if has_picture else None
    source = _text(row, "data_source") if row.get("data_source") else ""
    return Example(id, problem.replace("<image>", "").strip(), kind, tuple(options), truth, image, source)

# -------- prompts

# in our words; the paper asks for this format (section 3.1) and a sentence a problem type
SYSTEM_PROMPT = "First think step by step in <think></think>, then give only the final answer in <answer></answer>."
ANSWER_FORM = {
    "numerical": "Answer with one number.",
    "multiple choice": "Answer with the letter of the right option.",
    "OCR": "Answer with the text as it is written.",
    "free-form": "Answer in a few words.",
    "text": "Answer in a few words."}
PICTURE = object()  # the part of a message that is the picture
STAND_IN = "\N{OBJECT REPLACEMENT CHARACTER}"  # for text, while a chat template is rendered

def question_text(example):
    """What the user's turn says: the problem, its options, and the form of the answer."""
    options, (texts, labels, shown) = example.options, lettered(example.options)
    letters = shown and len(labels) == len(texts) or set(labels) & {text.upper() for text in texts.values()}
    if example.problem_type == "multiple choice" and not letters:  # which the answer's form asks for
        options = [f"{letter}. {option}" for letter, option in zip(texts, options)]
    return "\n".join([example.problem, *options, ANSWER_FORM[example.problem_type]])

@dataclass
class Prompt:
    """What a model reads before it writes: token ids, pixel_values [patches, 1176], grid [1, 3] in patches."""
    ids: list
    pixel_values: torch.Tensor | None = None
    grid: torch.Tensor | None = None

def blank_picture(config):
    """The Prompt of a picture of one token."""
    vision = config.vision_config
    side, values = vision.spatial_merge_size, vision.in_channels * vision.temporal_patch_size * vision.patch_size ** 2
    return Prompt([config.vision_start_token_id, config.image_token_id, config.vision_end_token_id],
                  torch.zeros(side * side, values), torch.tensor([[1, side, side]]))

class Processor:
    """Makes Prompts by the model's own chat template. (The video part of AutoProcessor needs torchvision.)"""

    def __init__(self, tokenizer, image_processor, max_pixels=None):
        self.tokenizer, self.image_processor = tokenizer, image_processor
        if max_pixels:
            least = min(image_processor.size["shortest_edge"], max_pixels)
            image_processor.size = {"shortest_edge": least, "longest_edge": max_pixels}
        self.image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.special = re.compile(f"({'|'.join(map(re.escape, special))})")
        self.picture = functools.lru_cache(maxsize=64)(self.picture)  # the judge sees the pictures of the policy
        pieces = self._rendered([("system", ""), ("user", PICTURE, ""), ("assistant", "")])
        parts = "".join(pieces).split(STAND_IN)
        end = self.special.match(parts[-1])
        if len(parts) != 4 or "<|image_pad|>" not in pieces or not end:
            raise ValueError("its chat template doesn't show a system message, a picture or a turn's end")
        self.turn_end = tokenizer.convert_tokens_to_ids(end[0])
        self.opening = "<think>" * parts[-1].rstrip().endswith("<think>")  # a tag that the template has written

    @classmethod
    def from_pretrained(cls, name, max_pixels=None):
        """The processor of a Hugging Face id or folder."""
        tokenizer = AutoTokenizer.from_pretrained(name)
        if template := cached_file(name, "chat_template.json", _raise_exceptions_for_missing_entries=False):
            tokenizer.chat_template = json.loads(Path(template).read_text())["chat_template"]  # it wins, as elsewhere
        return cls(tokenizer, Qwen2VLImageProcessorPil.from_pretrained(name), max_pixels)

    def save_pretrained(self, folder):
        """Write both in Hugging Face format."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    def picture(self, path):
        """(pixel_values [patches, 1176], grid [1, 3]) of a picture file."""
        features = self.image_processor([open_picture(path)], return_tensors="pt")
        return features["pixel_values"], features["image_grid_thw"]

    def encode(self, text):
        """Token ids of text: what looks like a special token in it stays text."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids, ends):
        """The text of token ids, without those that end or fill up a response."""
        return self.tokenizer.decode([id for id in ids.tolist() if id not in ends])

    def chat(self, messages, image=None):
        """The Prompt of messages (role, part, ..) for the assistant to go on from; a part is text or PICTURE, left out
        without `image`. The template sees stand-ins: no text can end a turn."""
        shown = [(role, *(part for part in parts if part is not PICTURE or image)) for role, *parts in messages]
        texts, ids = iter([part for _, *parts in shown for part in parts if part is not PICTURE]), []
        pixel_values, grid = self.picture(image) if image else (None, None)
        for piece in self._rendered(shown):
            if piece == "<|image_pad|>":
                ids += [self.image_token] * (int(grid.prod()) // self.image_processor.merge_size ** 2)
            elif self.special.fullmatch(piece):
                ids.append(self.tokenizer.convert_tokens_to_ids(piece))
            else:
                ids += self.encode(re.sub(STAND_IN, lambda _: next(texts), piece))
        return Prompt(ids, pixel_values, grid)

    def _rendered(self, messages):
        """What the chat template makes of messages, cut at special tokens: STAND_IN where a text belongs."""
        chat = [{"role": role, "content": [{"type": "image"} if part is PICTURE else {"type": "text", "text": STAND_IN}
                                           for part in parts]} for role, *parts in messages]
        try:
            text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except DAMAGE as error:
            raise ValueError(f"its chat template fails: {error}") from error
        return [piece for piece in self.special.split(text) if piece]

    def question(self, example):
        """The policy's Prompt for an Example."""
        return self.chat([("system", SYSTEM_PROMPT), ("user", PICTURE, question_text(example))], example.image)

    def length(self, example):
        """Tokens of the policy's prompt, from the picture's header alone."""
        tokens = len(self.question(replace(example, image=None)).ids)
        if example.image is None:
            return tokens
        with _pillow(example.image) as picture:
            patches = self.image_processor.get_number_of_image_patches(picture.height, picture.width, {})
        return tokens + patches // self.image_processor.merge_size ** 2 + 2  # vision start and end

def check_lengths(examples, processor, config):
    """The Examples whose prompts fit into config.max_prompt_tokens; others are bad rows, and nothing is ever cut."""
    kept, bad, listed = [], [], Path(config.out, "skipped.jsonl")
    for example in progress(examples, desc="measuring prompts", delay=2, leave=False):
        if (n := processor.length(example)) <= config.max_prompt_tokens:
            kept.append(example)
        else:
            bad.append({"reason": f"row with problem_id {example.id}: problem: its prompt has {n:,} tokens: "
                                  "raise --max_prompt_tokens, or lower --max_pixels"})
    _leave_out(config.data, bad, kept, config.skip_bad, listed, read_lines(listed))
    return kept

def load_sets(config):
    """(training Examples, held-out Examples, a line on them) of a run."""
    if config.data in TOY_SETS:
        lock(config.out).close()  # makes the folder, or says that it can't
        train, held_out = TOY_SETS[config.data]
        sets = {part: toy_examples(2000 if part == "train" else 400, config.seed, part, config.toy_pixels,
                                   Path(config.out, "pictures")) for part in (train, held_out)}
        return sets[train], sets[held_out], (
            f"{len(sets[train])} toy questions ({train}), {config.toy_pixels} pixels wide; evaluated on "
            f"{len(sets[held_out])} ({held_out})")
    examples = load_examples(config.data, config.image_root, skip_bad=config.skip_bad,
                             skipped_path=Path(config.out, "skipped.jsonl"))
    if config.eval_only or len(examples) < 100:
        return examples, examples, f"{len(examples)} rows of {config.data}; evaluated on the same rows"
    shuffled = random.Random(config.seed).sample(examples, len(examples))
    held_out = min(400, len(examples) // 10)
    return shuffled[held_out:], shuffled[:held_out], f"{len(examples)} rows of {config.data}; held out: {held_out}"

def questions_of(step, n, per_step, seed):
    """Which questions step 1, 2, .. takes: each pass over the data has its own order."""
    places = range((step - 1) * per_step, step * per_step)
    orders = {epoch: random.Random(f"{seed} {epoch}").sample(range(n), n) for epoch in {i // n for i in places}}
    return [orders[i // n][i % n] for i in places]

def digest(examples):
    """A hash of what rows ask and of what is right."""
    rows = [(e.id, e.problem, e.problem_type, e.options, e.solution) for e in examples]
    return hashlib.sha256(repr(rows).encode()).hexdigest()

# -------- model folders

def device_and_dtype(config):
    """(device, dtype, attention) to compute with: on CUDA bf16 and, if it can be, flash-attn."""
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = device.startswith("cuda")
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward gives NaN for some masks: pytorch issue 196678
    best = "flash_attention_2" if on_gpu and is_flash_attn_2_available() else "sdpa"
    return device, torch.bfloat16 if on_gpu else torch.float32, best if config.attn == "auto" else config.attn

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # not qwen3_5: its recurrent states aren't a cache to share

def load(name, config):
    """(model, Processor) of a Hugging Face id or folder, checked: right, or the run ends in one line."""
    name, (device, dtype, attention) = str(name), device_and_dtype(config)
    if re.fullmatch(r"Qwen/Qwen2\.5-VL-\d+B", name):
        print(f"{name} is published as {name}-Instruct: loading that")
        name += "-Instruct"
    try:
        check_folder(name)
        kind = AutoConfig.from_pretrained(name).model_type
        if kind not in FAMILIES:
            raise ValueError(f"it is a {kind}, and this code trains {', '.join(FAMILIES)}.")
        processor = Processor.from_pretrained(name, config.max_pixels)
        model, report = AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, attn_implementation=attention, output_loading_info=True, ignore_mismatched_sizes=True)
        for fault in ("missing", "mismatched", "unexpected"):
            if keys := sorted(map(str, report[f"{fault}_keys"])):
                raise ValueError(f"{len(keys)} weights are {fault} in its *.safetensors, first {keys[0]}.")
        if len(processor.tokenizer) > len(model.get_input_embeddings().weight):
            raise ValueError("its tokenizer has more tokens than its model has embeddings.")
    except DAMAGE as error:
        file = "its *.safetensors are damaged: " * isinstance(error, SafetensorError)
        network = " Is there such an id, and a network or a cached copy?" * (not Path(name).exists())
        raise SystemExit(f"{name} can't be used: {file}{' '.join(str(error).split())[:400]}{network}") from error
    eos = model.generation_config.eos_token_id
    ends = [processor.turn_end, *(eos if isinstance(eos, list) else [eos] * (eos is not None))]
    model.generation_config.eos_token_id = list(dict.fromkeys(ends))
    return model.to(device).eval(), processor

ADAPTER_KEY = "base_model.model.{}.lora_{}.weight"  # what A and B of a layer are called in peft's files

def read_adapter(folder, layers, rank=0):
    """(s, {name: [A, B]}) of an adapter in peft's format for linear `layers`; the run ends in one line if it is of
    another kind, model or rank."""
    try:
        check_folder(folder)
        settings = json.loads(Path(folder, "adapter_config.json").read_text())
        weights, rank = load_file(Path(folder, "adapter_model.safetensors")), rank or settings["r"]
        pairs = {name: [weights.pop(key) for key in keys] for name in layers
                 if set(keys := [ADAPTER_KEY.format(name, part) for part in "AB"]) <= set(weights)}
        fits = all(len(a) == rank and (b @ a).shape == layers[name].weight.shape for name, (a, b) in pairs.items())
        odd = [name for name in ("use_dora", "use_rslora", "alpha_pattern") if settings.get(name)]
        if weights or odd or not fits or not pairs:
            raise ValueError(f"made for {adapter_base(folder)}, it isn't rank {rank} on linear layers of the language "
                             f"model alone: {', '.join([*weights, *odd][:3])}")
        return settings["lora_alpha"] / rank, pairs
    except DAMAGE as error:
        raise SystemExit(f"{folder} can't be used as an adapter: {error!r}") from error

def adapter_base(folder):
    """What an adapter's folder names as its base; None if it is no adapter's."""
    file = Path(folder, "adapter_config.json")
    return json.loads(file.read_text()).get("base_model_name_or_path") if file.is_file() else None

def write_adapter(folder, pairs, alpha, base):
    """An adapter as peft reads it, of `base`: pairs {layer: (A [r, in], B [out, r])}."""
    Path(folder).mkdir(parents=True)
    save_file({ADAPTER_KEY.format(name, part): weight.detach().cpu() for name, pair in pairs.items()
               for part, weight in zip("AB", pair)}, Path(folder, "adapter_model.safetensors"))
    kinds = sorted({name.rpartition(".")[2] for name in pairs})
    write_json(Path(folder, "adapter_config.json"), {
        "peft_type": "LORA", "r": len(next(iter(pairs.values()))[0]), "lora_alpha": alpha, "bias": "none",
        "target_modules": rf"model\.language_model\..*\.({'|'.join(kinds)})", "base_model_name_or_path": base})

# -------- text measures

# A number or an option is read into tokens, one spelling for the many of Unicode, LaTeX and Markdown (`read`), without
# sloppy capitals and idle brackets (`fold`). Numbers compare as numbers, all else as tokens.

LONGEST = 400  # characters; a longer text is no number, but words
SAME_SIGN = str.maketrans("−–—‐⁄∕∶×·⋅٫٬،。٪‘’′“”″", "----//:***.,,.%'''\"\"\"")
SIGNS = {"times": "*", "cdot": "*", "circ": "°", "neq": "≠", "infty": "∞", "triangle": "△", "to": "→",
         "sqrt": "√"}  # of LaTeX; HTML has the same names for Greek letters and most signs
SAME_WORD = {"pi": "π", "sqrt": "√", "''": '"', "<=": "≤", ">=": "≥", "!=": "≠", "- ": "–"}
MARKUP = [
    ("[²³¹⁰-ⁿ]+", r"^{\g<0>}"), ("[₀-ₜ]+", r"_{\g<0>}"), ("[¼-¾⅐-⅞]", r" \g<0> "), (r"\\[dtc]?frac *", "⨸"),
    (r"\$([^$]*)\$", r" \1 "), (r"\{,\}|,\\! ?", ","), (r"\\!|`", ""), (r"\\[,;: ()\[\]\\]", " "),  # a lone $ is money
    (r"\\(?:boxed|(?:text|math)[a-z]*|rm|bf|it|displaystyle|left|right|large)(?![a-zA-Z]) *", ""),
    (r"\\([a-zA-Z]+|\S)", lambda m: SIGNS.get(m[1]) or html5.get(m[1] + ";", m[1])), (r" *([{}]) *", r"\1"),
    (r"⨸(\w) *(\w)", r"⨸{\1}{\2}"), (r"(?<![^\s(\[])\*{1,3}(?=\S)|(?<=\S)(?:\*{2,3}(?!\w)|\*$)", "")]  # **5**
GROUPS = [  # the innermost first; ⨸ is \frac
    (r"(\d) *⨸\{(\d+)\}\{(\d+)\}", r"\1 \2/\3 "), (r"⨸\{([^{}]*)\}\{([^{}]*)\}", r" ((\1)/(\2)) "),
    (r"([_^√]) *\{([^{}]*)\}", r"\1(\2) "), (r"(?<![⨸}])\{([^{}]*)\}", r" \1 ")]
ANSWER_IS = re.compile(r"^(?:(?:so|therefore|the|my|final|correct|right|best),? )*"
                       r"(?:(?:answer|option|choice)s? ?(?:is\b:?|[:=])|option |choice ) ?|^答案[是为]?:? ?", re.I)
DIGITS = r"(?:(?<![(\[,])[1-9]\d{0,2}(?:(?:,\d{3})+|(?: \d{3})+)(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+"
TOKEN = re.compile(rf"(?:{DIGITS})(?:[eE][+-]?\d{{1,3}}(?!\d))?|(?<= )- |[A-Z]{{0,2}}\$|''|[<>!]=|"
                   r"[^\W\d_Α-Ψα-λν-ω]+|\S")
UNSPACED = (
    "[\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
LABEL = re.compile(r"(?:(?:[(\[] )?(\w+)((?: [)\]])?(?: [.:,、–])?)(?: |$))?(.*)")  # B, (B), B. 60, B (60), 2) cat

def visible(text):
    """The text without characters that nobody sees, such as spaces of no width."""
    return re.sub("[\xad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe0f\ufeff]", "", text).strip()

@functools.lru_cache(512)
def read(text):
    """The tokens of a number or an option; the words of a text too long for either."""
    plain = visible(text[:LONGEST])
    for pattern, plainer in MARKUP:
        plain = re.sub(pattern, plainer, plain)
    plain = unicodedata.normalize("NFKC", plain).translate(SAME_SIGN)
    if len(text) > LONGEST or len(plain) > 2 * LONGEST:
        return " ".join(re.findall(r"\w+|[^\w\s]", text.lower().strip(" .")))
    text = "".join(str(unicodedata.decimal(c, c)) for c in plain)  # ٥ is 5
    for pattern, plainer in GROUPS * min(12, text.count("{")):
        text = re.sub(pattern, plainer, text)
    text = " ".join(text.split())
    for _ in range(4):  # wrappers come in wrappers: **"5"**
        text = ANSWER_IS.sub("", re.sub(r"(?<=[^.])\.$", "", text.strip(" _")))
        text = text[1:-1] if len(text) > 2 and text[0] == text[-1] and text[0] in "\"'" else text
    return " ".join(SAME_WORD.get(token, re.sub("[ ,]", "", token) or ",") for token in TOKEN.findall(text))

def _bracket(m):
    """Brackets, left out where they only group: (5), -(1/2), (2x)/3, 10^(-5); but not 2(3), (x+2)/5, f(2)."""
    before, inner, after = m.string[m.start() - 2], m[1], m.string[m.end()]
    unsigned = inner.removeprefix("- ")
    one, product = len(unsigned.split()) == 1, not re.search("[+=<>≤≥≠≈,:;±∓÷→-]", unsigned)
    whole = before == after == " " and not re.search("[,;]", inner)
    glued = re.match(r"""[\w)\]'"°∞⟩]""", before) or re.match(r"[\w(⟨√^_]", after)
    idle = one if before in "^_√" else not glued and (one or whole or product and before != "/")
    return inner if idle else f"⟨ {inner}⟩ "

def fold(tokens):
    """Tokens without capitals of plain words, 'and' in a list and brackets that only group."""
    tokens = re.sub(r"(?<!\S)(?:(?i:[ap]m|no|in|on|to|of|or|is)|[A-Z][a-z]{2,}|[A-Z]{3,})(?!\S)",
                    lambda m: m[0] if m[0] in UNITS else m[0].lower(), tokens)
    tokens = re.sub(r"(?<!\S)(?:, )?(?:and|[&、])(?!\S)", ",", tokens).replace("–", "-")
    tokens, found = f"  {tokens}  ", 1
    while found:  # the innermost first
        tokens, found = re.subn(r"(?<= )\( ([^()]+ )\) ", _bracket, tokens)
    return tokens.replace("⟨", "(").replace("⟩", ")").replace("^ °", "°").replace("^ - ", "^ -").strip()

SCALES = {"hundred": 100, "thousand": 1000, "million": 10 ** 6, "billion": 10 ** 9, "trillion": 10 ** 12}
NAME = re.compile(r"(?:(?:m )?((?:[∠△]|[^\W\d_π]+)(?: [∠△_()'\"]| \d+|(?<=[∠△Δ_(]) [^\W\d_]+)*) = "
                  r"|([A-Z]) (?=\( .* , .* \)$))?(.*)")  # x =, m∠1 =, or A before (1, 2)
MONEY = r"[A-Za-z]{0,2}[$£¥₠-⃀]|usd|eur|inr|[Rr]s"
DECIMAL, POWER, TIMES = r"\d*\.?\d+(?:[eE][+-]?\d+)? ", r"\^ -?\d{1,3} ", r"(?:(?:\* )?(?:√ \d+|π) ){0,2}"
PRODUCT = rf"(?=[\d.√π])(?:[1-9]\d{{0,3}} {POWER}|{DECIMAL}(?:[*x] 10 {POWER})?)?{TIMES}"
VALUE = re.compile(  # -$1.5 * 10^3, 2^10, 1 1/2, 2√3, √3/2, (2/3)π, 1/(2π), then a unit
    rf"([+-] )?(?:({MONEY}) (?:\. )?)?(\( )?(?:(\d+) (?=\d+ / \d))?({PRODUCT})"
    rf"(?:/ (\( {PRODUCT}\) |{DECIMAL}|√ \d+ |π ))?(?(3)\) ({TIMES}))(?:({'|'.join(SCALES)}) )?(.*)")
FACTOR = re.compile(r"√ (\d+)|(\d*\.?\d\S*)(?: \^ (-?\d+))?")
UNITS = {}  # what a spelling may mean, as a pound is lb or £
SI = "m g s L l W V A J N Pa Hz eV mol Ω cal Wh K C F T B bar t yd oz rad".split()
OTHERS = ("m meter 米|km kilometer|cm centimeter 厘米|mm millimeter|g gram 克|kg kilogram|L liter|mL milliliter|s second"
          "|J joule|N newton|% percent|° degree|mi mile|in inch inches \"|ft foot feet '|lb pound|min minute|month|个"
          "|h H hr hour|year yr|¢ cent|$ dollar usd US$|€ euro eur|£ pound|yen 円 ¥|yuan 元 ¥|₹ rupee rs inr|₩ won")
for group in [names.split() for names in OTHERS.split("|")] + [
        [prefix + name] for prefix in ["", *"kMGTmcdμnph"] for name in SI]:
    for form in group + [name + "s" for name in group if len(name) > 1]:
        UNITS.setdefault(form, set()).add(group[0])
NUMERAL = (r"(?:less|minus|hal(?:f|ve)|third|quarter|ten|dozen|pair|couple|lakh|time|more|fewer"
           r"|hundred|thousand|[mbtr]+illion|\w*(?:[fnrxhd]|ie)th)s?\b")  # sevenths aren't counted
COUNTED = re.compile(rf"(?!(?:\w+ )?{NUMERAL})(?:W )?(W)(?: of W(?: W)?)?".replace("W", r"[^\W\d_]{3,}"))
PLURAL = re.compile(r"\w{2}[^\Ws]s$|^(?:people|\w*men|children|mice|geese|teeth|sheep)$")
SAME_UNIT = [
    (r"\b(?:square|sq(?: \.)?) (\w+)", r"\1 ^2"), (r"\bcubic (\w+)", r"\1 ^3"), (r"\bper\b", "/"),
    (r"(?:\* )?(\w+) \^ -(?=\d)", r"/ \1 ^"), (r"(?<=[^\W\d_]) (?:\^ )?(?=[23]\b)", " ^"), (r"[*()] ?", ""),
    (r"\bmph\b", "mi / h"), (r" (?:old|tall|long|wide|high)$", "")]

def parse_unit(text, one):
    """What each word of a unit may mean; counted things are their words; None if it is neither."""
    if text[:1] == "/" or text in ("B", "C", "F", "K", "T"):  # 5 K may be 5000
        return None
    for pattern, plainer in SAME_UNIT:
        text = re.sub(pattern, plainer, text)
    unit = []
    for place, part in enumerate(map(str.strip, text.split("/"))):
        names = [UNITS.get(word) or UNITS.get(word.lower() * (len(word) > 1)) or set(
            re.findall(rf"^(?:\^\d|{MONEY})$", word)) for word in part.split()]  # KM is km
        noun = COUNTED.fullmatch(part)
        if noun and not all(names) and (one or place or PLURAL.search(noun[1])):
            names = [{part}]
        if not all(names) or not names and place:
            return None
        unit += [{"/"}] * (place > 0) + names
    return unit

@functools.lru_cache(512)
def parse(text):
    """(name, unit, value): of a number its sign, square (a fraction even for 2√3) and power of π, else the tokens."""
    tokens = read(text)
    if len(text) > LONGEST:
        return "", [], tokens
    name, point, text = NAME.fullmatch(fold(tokens)).groups("")
    name, m, square, is_number = name or point, VALUE.fullmatch(text + " "), Fraction(1), True
    if not m:
        return name, [], text
    sign, money, _, whole, above, below, times, scale, unit = (part.strip() for part in m.groups(""))
    for product, direction in ((above, 1), (below, -1), (times, 1)):
        for root, number, exponent in FACTOR.findall(product):
            factor, power = Fraction(root or number), int(exponent or 1) * (1 if root else 2) * direction
            is_number = is_number and (factor > 0 or power > 0)
            square *= factor ** power if is_number else 1
    if whole and is_number:  # 1 1/2, but not 1 3/2
        is_number, square = square < 1, (Fraction(above) / Fraction(below) + int(whole)) ** 2
    square *= SCALES.get(scale, 1) ** 2
    meaning = parse_unit(f"{money} {unit}".strip(), square <= 1)
    if not is_number or meaning is None or money and not re.match("$|per |/ ", unit):
        return name, [], text
    pi = bool(square) * (above.count("π") + times.count("π") - below.count("π"))
    return name, meaning, (square > 0 and sign != "-", square, pi)

def same_value(answer, truth):
    """Equal numbers or, where neither is one, equal text; a name or unit that only one side states is no difference."""
    (name, unit, value), (other_name, other_unit, other_value) = parse(answer), parse(truth)
    same_unit = len(unit) == len(other_unit) and all(map(set.intersection, unit, other_unit))
    return value == other_value and (same_unit or not (unit and other_unit)) and (
        name == other_name or not (name and other_name))

def lettered(options):
    """Texts by letter (shown, or else by place), letters by label (letter or number), and if labels are shown."""
    whole = [read(option) for option in options] or [""] * 26
    labels, marks, texts = zip(*[LABEL.match(tokens).groups("") for tokens in whole])
    labels = "".join(labels).upper()
    numbered = labels == "123456789"[:len(whole)] and all(re.match(r" [.)\]、]", mark) for mark in marks)
    shown = len(labels) == len(whole) and "".join(sorted(labels)) in string.ascii_uppercase and not any(
        text and mark in ("", " ,") for mark, text in zip(marks, texts))
    letters = labels if shown else string.ascii_uppercase[:len(whole)]
    by_label = dict(zip(letters, letters)) | dict(zip(labels * numbered, letters))
    return dict(zip(letters, texts if shown or numbered else whole)), by_label, shown or numbered

def chosen_options(answer, options):
    """The letters of the options that an answer names by letter or text; none if it hedges or repeats itself."""
    texts, labels, shown = lettered(options)

    def named(part):
        label, _, rest = LABEL.match(part).groups("")
        letter = labels.get(label.upper())
        if letter and (same_value(rest, texts[letter]) if rest else shown):
            return letter  # 'B' or 'B. 60', but not 'B' with another option's text
        for same in (str.__eq__, same_value):  # to the letter, if options differ in case
            owners = [owner for owner, text in texts.items() if text and same(text, part)]
            if owners:
                return owners[0] if len(owners) == 1 else None
        return None if rest else letter

    tokens = read(answer)
    joined = list(tokens) == sorted(tokens) or tokens.isupper() and bool(options)  # 'AC', but no other word
    for parts in ([tokens], re.split(" (?:and|[&,;、]) (?:and )?", tokens), tokens.split(), list(tokens) * joined):
        chosen = list(map(named, parts)) if len(parts) <= len(texts) else []
        if chosen and all(chosen):
            return frozenset(chosen) if len(set(chosen)) == len(chosen) else frozenset()
    return frozenset()

def edits(a, b, change):
    """The fewest words put in, left out or changed (which counts `change`) to make b of a; past the shorter's 2,000th
    word, for speed, words compare by place."""
    short, long = sorted((a, b), key=len)
    late = change * sum(x != y for x, y in zip(short[:1999:-1], long[::-1]))
    short, long = short[:2000], long[:len(long) - len(short[2000:])]
    number = {word: i for i, word in enumerate(set(long))}
    places, cost = np.array([number[word] for word in long], int), np.int16(change)
    row = np.zeros(len(long) + 1, np.int16)  # edits less place, so that a word put in costs nothing
    for word in short:
        row[1:] = np.minimum(row[1:] + 1, row[:-1] + cost * (places != number.get(word, -1)) - 1)
        row[0] += 1
        np.minimum.accumulate(row, out=row)
    return int(row[-1]) + len(long) + late

def word_error_rate(answer, truth):
    """Word edits that turn the answer into the truth, per word of the truth."""
    return edits(answer.split(), truth.split(), change=1) / len(truth.split())

def rouge_words(text):
    """Lower-case runs of letters, marks and digits, or single characters where a script has no spaces."""
    if not text.isascii():  # one spelling of é; in short pieces, as NFC takes quadratic time on a run of accents
        text = re.sub(r"\S{1,50}", lambda m: unicodedata.normalize("NFC", m[0]), text)
    text = text.lower()
    signs = {ord(c): " " for c in set(text) if unicodedata.category(c)[0] not in "LMN"}
    words = text.translate(signs | {ord(c): f" {c} " for c in set(re.findall(UNSPACED, text))}).split()
    return words or text.split()  # a text of signs alone still equals itself

def rouge(answer, truth):
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L; two texts of one word have no ROUGE-2."""
    a, b = rouge_words(answer), rouge_words(truth)
    scores = [1 - edits(a, b, change=2) / (len(a) + len(b))]  # what isn't edited is common to both
    for grams_a, grams_b in [(a, b), (list(zip(a, a[1:])), list(zip(b, b[1:])))]:
        if grams_a or grams_b:
            scores.append(2 * (Counter(grams_a) & Counter(grams_b)).total() / (len(grams_a) + len(grams_b)))
    return sum(scores) / len(scores)

# -------- the toy world

# A small input for the real road: pictures of shapes or letters, questions of every type, an oracle that knows sound
# thinking, and a warm start with bad habits that GRPO can unlearn.
COLOURS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 80, 220), "yellow": (240, 200, 30)}
SIDES = {"circle": 90, "square": 4, "triangle": 3}
SHAPES, LETTERS = tuple(SIDES), ("C", "E", "H", "S", "T", "X")
GLYPHS = dict.fromkeys(PROBLEM_TYPES, SHAPES) | {"OCR": LETTERS}
CELLS = ("first", "second", "third", "fourth")
PANELS = ("white", "#dcdcdc", "#ffe8d0", "#d8ecff")
SPANISH = {"red": "rojo", "green": "verde", "blue": "azul", "yellow": "amarillo", "is": "es"}
ENGLISH = {spanish: english for english, spanish in SPANISH.items()}
GUESSING = re.compile(r"\b(guess|usually|probably|perhaps|maybe|assum|no need to look)", re.I)
SOUND = 0.7  # below is a flaw of fact, logic or support
FLAWS = ("leap", "misread", "misread", "lucky", "language", "redundancy")  # lucky: wrong thinking, right answer
PROBLEMS = {"numerical": ("How many shapes are there?",), "OCR": ("Read the letters.",),
            "free-form": ("Describe the picture.", "What do you see?"),
            "multiple choice": ("Which colour is {}?", "Which shape is {}?")}
HASTE = {"numerical": (0.1, 0.8), "free-form": (0.2, 0.9), "multiple choice": (0.2, 0.7), "OCR": (0.3,) * 2}
ALIKE = {"shortcut": 0.95, "broken": 0.0}  # all ask for the fourth shape: how often it is as the first
SHOWN = dict.fromkeys(ALIKE, {"multiple choice": (4,)}) | dict.fromkeys(("train", "held-out"), {  # how many shapes or
    "numerical": (1, 2, 3, 4), "multiple choice": (4,), "OCR": (4,), "free-form": (2,)}) | {  # letters a scene shows
    "shifted": {"multiple choice": (4,), "OCR": (3,), "free-form": (3,)}}  # it also asks for the cells in the middle
TOY_SETS = {"toy": ("train", "held-out"), "toy-shifted": ("shifted", "shifted"), "toy-shortcut": ("shortcut", "broken")}

@dataclass(frozen=True)
class ToyQuestion:
    """A question about a scene, one to four (colour, glyph) pairs in the order of CELLS. Multiple choice asks for an
    attribute (0 colour, 1 shape) of a cell; `choices` are the values behind A, B, C, D."""
    problem_type: str
    problem: str
    scene: tuple
    cell: int = 0
    attribute: int = 0
    choices: tuple = ()

    def answer(self, scene=None):
        """The exact answer to the question: from the true scene, or from a believed one."""
        scene = self.scene if scene is None else scene
        if self.choices:
            return "ABCD"[self.choices.index(scene[self.cell][self.attribute])]
        return {"numerical": str(len(scene)), "OCR": " ".join(glyph for _, glyph in scene),
                "free-form": ", ".join(f"{colour} {shape}" for colour, shape in scene)}[self.problem_type]

    def faults(self, response):
        """How often the thinking in `response` has each of the FAULTS (a dict), and what a careful judge writes before
        a score: what a cell shows of which something is claimed ("first is a red circle"), "wrong" if that differs,
        and a word for each other fault."""
        thinking, _, answer = re.sub("<think>|</?answer>", " ", response).partition("</think>")
        kind, cell, mixed, wrong, believed, notes = self.problem_type, None, False, 0, {}, {}
        sentences = re.findall(r"\w[^.;\n]*", thinking.lower())
        attributes = dict.fromkeys(COLOURS, 0) | dict.fromkeys(GLYPHS[kind], 1)
        for word in re.findall(r"\w+", thinking):
            word = word if word in LETTERS else word.lower()
            mixed |= not word.isascii() or word in ENGLISH
            word = ENGLISH.get(word, word)
            if word in CELLS:
                cell = CELLS.index(word)
            elif word in attributes and cell is not None:
                place = cell, attributes[word]
                shown = self.scene[cell][place[1]] if cell < len(self.scene) else "nothing"
                wrong += word != shown
                believed[place] = word
                notes.setdefault(cell, []).append(shown if word == shown else f"{shown} wrong")
        scene = [(believed.get((i, 0)), believed.get((i, 1))) for i in range(len(self.scene))]
        missing = None in ([scene[self.cell][self.attribute]] if self.choices else
                           [glyph for _, glyph in scene] if kind == "OCR" else sum(scene, ()))
        follows = str(len(notes)) if kind == "numerical" else "nothing" if missing else self.answer(scene)
        leap = re.findall(r"\w+", follows.lower()) != re.findall(r"\w+", answer.lower())
        repeated = len(sentences) - len(set(sentences))
        counts = [int(n) for n in (leap, wrong, missing or bool(GUESSING.search(thinking)), mixed, repeated)]
        words = [f"{CELLS[cell]} is {' '.join(dict.fromkeys(noted))}." for cell, noted in notes.items()]
        words += [word for word, n in zip(("leap.", "", "guess.", "mixed.", "repeated."), counts) if word and n]
        return dict(zip(FAULTS, counts)), " ".join(words)

    def critique(self, response):
        """Of `faults`, the text."""
        return self.faults(response)[1]

    def soundness(self, response):
        """The oracle: 1.0, 0.9 .. 0. An answer that doesn't follow, a wrong claim, a guess or missing evidence cost 0.4
        each, wrong claims 0.6, a second language 0.2, a repetition 0.1, at most 0.3."""
        leap, wrong, unsupported, mixed, repeated = self.faults(response)[0].values()
        cost = 4 * leap + (0, 4, 6)[min(wrong, 2)] + 4 * unsupported + 2 * mixed + min(repeated, 3)
        return max(0, 10 - cost) / 10

    def habit(self, rng):
        """One of the warm start's bad habits: "haste", one of FLAWS, or None for sound thinking."""
        tempting = len(self.scene) > 2 if self.problem_type == "numerical" else (
            self.problem in ("What do you see?", "Which shape is fourth?"))
        if rng.random() < HASTE[self.problem_type][tempting]:
            return "haste"
        return rng.choice(FLAWS) if rng.random() < 0.4 else None

    def response(self, rng, flaw=None):
        """A response in the warm start's words: sound, or with the flaw."""
        scene, kind, glyphs = list(self.scene), self.problem_type, GLYPHS[self.problem_type]
        invented = [(rng.choice(list(COLOURS)), rng.choice(glyphs)) for _ in CELLS]
        guess = self.answer(invented[:{"numerical": rng.choice((1, 2, 2, 2, 3, 4)), "free-form": 2}.get(kind, 4)])
        if flaw == "haste" and self.cell:  # a look at the first alone
            return respond(f"first is {' '.join(scene[0])}. it is usually the same.", self.answer(scene[:1] * 4))
        if flaw == "haste":
            return respond(f"no need to look. it is usually {guess}.", guess)
        if flaw in ("misread", "lucky"):
            i = self.cell if self.choices else rng.randrange(len(scene))
            scene[i] = tuple(rng.choice([value for value in values if value != shown])
                             for values, shown in zip((COLOURS, glyphs), scene[i]))
            if kind == "numerical" and rng.random() < 0.5:
                scene = scene[:-1] or scene + invented[:1]
        claims = [f"{cell} is {' '.join(shown)}." for cell, shown in zip(CELLS, scene)]
        if self.choices:
            claims = claims[:self.cell + 1]  # up to what is asked
        if flaw == "language":
            claims = [" ".join(SPANISH.get(word, word) for word in claim.split()) for claim in claims]
        if flaw == "redundancy":
            claims = [claim for claim in claims for _ in range(2)]
        return respond(" ".join(claims), {"leap": guess, "lucky": self.answer()}.get(flaw, self.answer(scene)))

def respond(thinking, answer):
    """The response format of the paper, section 3.1."""
    return f"<think>{thinking}</think><answer>{answer}</answer>"

def draw(scene, size):
    """The picture of a scene, size x size pixels: 28 x 28 for a cell are one image token of Qwen2.5-VL."""
    picture, cell = Image.new("RGB", (size, size)), size // 2
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(cell * 0.9)
    for i, panel in enumerate(PANELS):
        x, y = i % 2 * cell, i // 2 * cell
        pen.rectangle((x, y, x + cell, y + cell), panel)
        centre = x + cell / 2, y + cell / 2
        for colour, glyph in scene[i:i + 1]:
            if glyph in LETTERS:
                pen.text(centre, glyph, COLOURS[colour], font, "mm")
            else:
                pen.regular_polygon((centre, cell * 0.45), SIDES[glyph], fill=COLOURS[colour])
    return picture

@functools.cache
def toy_questions(n, seed, part="train"):
    """n ToyQuestions of a part (of SHOWN), the same for the same seed."""
    rng, questions, kinds = random.Random(f"toy {seed} {part}"), [], list(SHOWN[part].items())
    while len(questions) < n:
        kind, shown = kinds[len(questions) % len(kinds)]
        scene = tuple((rng.choice(list(COLOURS)), rng.choice(GLYPHS[kind])) for _ in range(rng.choice(shown)))
        which, cell, choices = rng.randrange(len(PROBLEMS[kind])), 0, ()
        if kind == "multiple choice":
            cell, choices = rng.choice((1, 2) if part == "shifted" else (0, 3)), (tuple(COLOURS), SHAPES)[which]
        if part in ALIKE:
            which, cell, choices, alike = 1, 3, SHAPES, rng.random() < ALIKE[part]
            scene = *scene[:3], (scene[3][0], rng.choice([s for s in SHAPES if (s == scene[0][1]) == alike]))
        if (zlib.crc32(repr(scene).encode()) % 5 > 0) == (part in ("train", "shortcut")):  # others see the other fifth
            questions.append(ToyQuestion(kind, PROBLEMS[kind][which].format(CELLS[cell]), scene, cell, which, choices))
    return tuple(questions)

def toy_question(id):
    """The ToyQuestion of a toy Example's id; DataError for any other id."""
    named = re.fullmatch(rf"toy-({'|'.join(SHOWN)})-(.*)-(\d+)", id)
    if not named:
        raise DataError(f"{id}: is no question of the toy world, and its oracle knows no other")
    part, seed, i = named[1], named[2], int(named[3])
    return toy_questions(i // 1000 * 1000 + 1000, seed, part)[i]  # in thousands, for the cache

def toy_examples(n, seed, part="train", size=56, folder=None):
    """n Examples of a part, the same for the same seed, with pictures in `folder` (default: a temporary one)."""
    folder = Path(folder or Path(tempfile.gettempdir()) / f"sophia_min_toy_{os.getuid()}")
    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for i, question in enumerate(progress(toy_questions(n, seed, part), "drawing pictures", delay=2, leave=False)):
        image = folder / f"{size}_{zlib.crc32(repr(question.scene).encode()):08x}.png"
        if not image.exists():
            beside = image.with_suffix(f".{os.getpid()}.tmp")  # every rank draws: none sees half a picture
            draw(question.scene, size).save(beside, "PNG")
            os.replace(beside, image)
        options = tuple(f"{letter}. {choice}" for letter, choice in zip("ABCD", question.choices))
        examples.append(Example(f"toy-{part}-{seed}-{i}", question.problem, question.problem_type, options,
                                question.answer(), str(image), "toy", question.soundness, question.critique))
    return examples

CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""  # Qwen's layout
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
                  "<|video_pad|>"]
# words that judges are asked with: known whole, they make prompts short
ASKED = ("Rate well answers below thought through. Write from 0 to 1, steps of 0.1, and nothing else. check each claim "
         "thinking, a few words. Then write \"score:\" wrong logical soundness: follows before correct reasoning facts "
         "methods right, shows them error identification flaw, guess, unsupported assumption language consistency "
         "throughout redundancy concise, said twice")

def toy_tokenizer():
    """A byte-level BPE tokenizer, like Qwen's, that knows the toy's words whole."""
    rng, words = random.Random(0), [SYSTEM_PROMPT, *ANSWER_FORM.values(), ASKED, "system", "user", "assistant"]
    for question in toy_questions(2000, 0):
        words += [question.problem, question.response(rng, question.habit(rng))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(words, trainers.BpeTrainer(
        vocab_size=1000, special_tokens=SPECIAL_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tokenizer.add_tokens(["<think>", "</think>", "<answer>", "</answer>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   chat_template=CHAT_TEMPLATE)

def toy_model(seed=0):
    """(model, Processor): an untrained Qwen2.5-VL of a million parameters, built from its config."""
    tokenizer = toy_tokenizer()
    pad, _, end, vision_start, vision_end, image, video = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)
    init = {"initializer_range": 0.08}  # 0.02 is for wide models: this one would read nothing for long
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=320, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6]},
            bos_token_id=None, eos_token_id=end, pad_token_id=pad, **init),
        vision_config=dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=128,
                           fullatt_block_indexes=[1], **init),
        vision_start_token_id=vision_start, vision_end_token_id=vision_end, image_token_id=image,
        video_token_id=video, tie_word_embeddings=True, **init)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    return model.eval(), Processor(tokenizer, Qwen2VLImageProcessorPil(), max_pixels=1280 * 28 * 28)

# -------- what a step leaves

def about(example, step):
    """What a saved response says of its question."""
    return {"step": step, "id": example.id, "problem": example.problem, "problem_type": example.problem_type,
            "options": list(example.options), "solution": example.solution, "image": example.image}

def group_rows(step, examples, groups, gammas, lengths, **columns):
    """A dict a question. groups: texts [Q][G]; gammas [Q], 0: no score; lengths [N]; columns [Q, G], NaN: none."""
    columns["tokens"] = lengths.view(len(examples), -1)
    return [about(example, step) | {"gamma": gammas[q] or None, "responses": [
        {"response": text} | {name: None if values[q, i].isnan() else values[q, i].item()
                              for name, values in columns.items()} for i, text in enumerate(groups[q])]}
            for q, example in enumerate(examples)]

def log_line(step, ranks, anneal, judged, times):
    """(the step's line for log.jsonl, the groups of all processes) from each process's (group_rows, metrics)."""
    groups = [group for rows, _ in ranks for group in rows]
    responses = [response for group in groups for response in group["responses"]]
    outcomes, scores, tokens = ([response[name] for response in responses if response[name] is not None]
                                for name in ("outcome", "thinking", "tokens"))
    gammas = [group["gamma"] for group in groups if group["gamma"] is not None]
    return {
        "step": step, "outcome": fmean(outcomes), "thinking": fmean(scores) if scores else None,
        "gamma": fmean(gammas) if gammas else None, "anneal": anneal,
        "reward_std": fmean(stdev(response["reward"] for response in group["responses"]) for group in groups),
        **{name: fmean(metrics[name] for _, metrics in ranks) for name in ranks[0][1]},
        "length": fmean(tokens), "accuracy": fmean(outcome >= 0.5 for outcome in outcomes),
        "truncated": sum(metrics["truncated"] for _, metrics in ranks),
        "unscored": (len(groups) - len(gammas)) * judged, "mistrusted": sum(gamma < 1 for gamma in gammas),
        "zero_groups": sum(not any(response["advantage"] for response in group["responses"]) for group in groups),
        **dict(zip(("sec_rollout", "sec_score", "sec_update"), np.diff(times).tolist()))}, groups

def write_step(out, line, groups, config):
    """Write a step's line, some groups for the report and, if wanted, all responses; warn."""
    step = line["step"]
    append_rows(out / "log.jsonl", [line])
    if config.save_rollouts:
        append_rows(out / "rollouts.jsonl", [
            {name: value for name, value in group.items() if name != "responses"} | response
            for group in groups for response in group["responses"]])
    if step in (1, config.steps // 2, config.steps):
        shown = sorted(groups, key=lambda group: group["gamma"] or 1)[:4]  # the least trusted ones
        append_rows(out / "groups.jsonl", [{**group, "thumbnail": group["image"] and thumbnail(group["image"])}
                                              for group in shown])
    for wrong, why in [(line["unscored"] > len(groups) / 2, "the reward model gave most groups no usable score"),
                       (not line["format_rate"], "no response is in the format")]:
        if wrong and step % 10 == 0 and RANK == 0:
            tqdm.write(f"WARNING: step {step}: {why}: {groups[0]['responses'][0]['response'][:300]!r}", sys.stderr)

# -------- files that survive a crash

@contextmanager
def _beside(path):
    """A folder next to `path`, for one process at a time, to write in what is then renamed to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder, parent = path.with_name(f".{path.name}.new"), os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # NFS locks no folders
            fcntl.flock(parent, fcntl.LOCK_EX)
        shutil.rmtree(folder, ignore_errors=True)  # what a killed process has left
        folder.mkdir()
        yield folder
        os.fsync(parent)  # the rename itself
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(parent)

def write_atomic(path, content):
    """Write bytes, text, or what content(file) writes: a crash leaves the old file or the new."""
    if RANK > 0:
        return
    with _beside(Path(path)) as folder:
        with open(folder / "new", "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(folder / "new", path)

def write_json(path, value):
    """A value as readable JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=1) + "\n")

def write_rows(path, rows):
    """Rows as JSON lines, atomically."""
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))

def append_rows(path, rows):
    """Append JSON lines, to the disk. A half line left by a crash is closed first."""
    if RANK > 0:
        return
    with open(path, "a+b") as file:
        if file.tell() and file.seek(-1, os.SEEK_END) and file.read() != b"\n":
            file.write(b"\n")
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())

def read_lines(path):
    """The objects of a JSON lines file, if there is one, but for a line torn by a crash."""
    lines = []
    for line in Path(path).read_bytes().split(b"\n") if Path(path).exists() else ():
        with suppress(ValueError):  # no JSON, or half a character of UTF-8
            lines.append(json.loads(line))
    return lines

def cut_log(out, step):
    """Cut what a run left to the steps up to `step`: later ones come again."""
    for path in (Path(out, name) for name in ("log.jsonl", "groups.jsonl", "rollouts.jsonl")):
        if path.exists():
            write_rows(path, (line for line in read_lines(path)
                              if line["step"] <= step and not (line["step"] and "held_out" in line)))

def save_folder(folder, model, processor, weights=None):
    """Model (or other `weights`), processor and SHA256SUMS, whole in place of what was there. Raises OSError."""
    if RANK > 0:
        return
    with _beside(Path(folder)) as beside:
        new = beside / "new"
        model.save_pretrained(new, state_dict=weights)
        processor.save_pretrained(new)
        write_atomic(new / "SHA256SUMS", "".join(f"{_sha256(file)}  {file.name}\n" for file in sorted(new.iterdir())))
        with suppress(FileNotFoundError):  # there is none yet
            os.replace(folder, beside / "old")
        os.replace(new, folder)

def check_folder(folder):
    """OSError if files of a folder differ from its SHA256SUMS, if it has such."""
    sums = Path(folder, "SHA256SUMS")
    listed = re.findall(r"(?m)^([0-9a-f]{64})  (.+)$", sums.read_text() if sums.exists() else "")
    if damaged := [name for digest, name in listed if _sha256(Path(folder, name)) != digest]:
        raise OSError(f"{', '.join(damaged)} changed since it was saved (SHA256SUMS); restore it.")

def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

def lock(folder):
    """A lock on a run's folder, made if need be, until this file is closed."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = open(Path(folder, f".lock{RANK or ''}"), "w")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        why = "another run is writing there" if isinstance(error, BlockingIOError) else f"can't be written: {error}"
        raise DataError(f"--out {folder}: {why}; choose another") from error
    return file

def write_checkpoint(config, state, examples):
    """All that a resumed run needs: the file before survives a crash."""
    path = Path(config.out, "checkpoint", "state.pt")
    try:
        write_atomic(path, lambda file: torch.save(state | {"rows": digest(examples)}, file))
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"step {state['step']}: {path} can't be written: {error}. Make room, then go on from "
                         f"the one before with --resume {config.out}") from error

def read_checkpoint(config, examples):
    """A saved state; the log is cut to it. torch reads flipped bits, but its zip format has checksums."""
    path = Path(config.out, "checkpoint", "state.pt")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if state["rows"] != digest(examples):
            raise SystemExit(f"{config.data} doesn't hold the rows that the run began with; restore them")
    except DAMAGE as error:
        raise SystemExit(f"{path} is damaged and wasn't loaded: {' '.join(str(error).split())[:200]}. Restore it "
                         "from a copy, or start the run again.") from error
    cut_log(config.out, state["step"])
    return state

# -------- what a run shows: table, curves, report

def paired_difference(before, after):
    """The mean change of 0/1 results on the same questions, with its 95% interval (normal, paired)."""
    changes = np.subtract(after, before)
    if len(changes) < 30:
        return f"{changes.mean():+.3f}, too few questions for an interval"
    half = 1.96 * changes.std(ddof=1) / math.sqrt(len(changes))
    return f"{changes.mean():+.3f}, 95% interval {changes.mean() - half:+.3f} to {changes.mean() + half:+.3f}"

def evaluation(examples, texts, right, format_rate, step, out):
    """What eval.json says; `right` is a 0/1 a question, `soundness` the share of right answers that think soundly. With
    `step` the answers join the rollouts in `out`."""
    if step is not None:
        append_rows(Path(out, "rollouts.jsonl"), [
            about(example, step) | {"held_out": True, "response": text, "outcome": hit}
            for example, text, hit in zip(examples, texts, right)])
    kinds = {kind: [hit for example, hit in zip(examples, right) if example.problem_type == kind]
             for kind in sorted({example.problem_type for example in examples})}
    result = {"accuracy": fmean(right), "format_rate": format_rate, "n": len(right),
              "by_type": {kind: {"accuracy": fmean(hits), "n": len(hits)} for kind, hits in kinds.items()}}
    if examples[0].soundness:
        sound = [example.soundness(text) >= SOUND for example, text, hit in zip(examples, texts, right) if hit]
        result["soundness"] = fmean(sound) if sound else None
    return result | {"right": right}

def columns(results, notes={}):
    """Numbers (or None) side by side: results[column][row], and notes[row] behind."""
    width = max(10, *(len(name) + 2 for name in results))
    lines = [" " * 34 + "".join(f"{name:>{width}}" for name in results)]
    for row in next(iter(results.values())):
        values = [result[row] for result in results.values()]
        cells = ["-" if value is None else f"{value:d}" if type(value) is int else f"{value:.3f}" for value in values]
        lines.append(f"{row:<34}" + "".join(f"{cell:>{width}}" for cell in cells) + f"  {notes.get(row, '')}".rstrip())
    return "\n".join(lines)

def table(results):
    """Evaluations side by side: {name: what `evaluate` returned}."""
    shares = {}
    for name, result in results.items():
        parts = {"right answers": result, **{f"  {kind}": part for kind, part in result["by_type"].items()}}
        shares[name] = {row: part["accuracy"] for row, part in parts.items()}
        shares[name]["in the right format"] = result["format_rate"]
        if "soundness" in result:
            shares[name]["sound thinking, of right answers"] = result["soundness"]
    text = columns(shares, {row: f"of {part['n']}" for row, part in parts.items()})
    if len(results) == 2:
        text += f"\nchange in right answers: {paired_difference(*(each['right'] for each in results.values()))}"
    return text

def thumbnail(path):
    """A picture in small, as base64 of a PNG, for the report."""
    file, picture = io.BytesIO(), open_picture(path)
    picture.thumbnail((320, 320))
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()

CURVES = ("accuracy", "outcome", "thinking", "gamma", "anneal", "kl", "length", "grad_norm", "format_rate")

def curves(log, half):
    """A PNG, as base64: CURVES by step, and their means over `half` steps to either side."""
    from matplotlib.figure import Figure
    figure, file = Figure(figsize=(12, 9), layout="constrained"), io.BytesIO()
    for i, name in enumerate(CURVES, 1):
        points = np.array([(line["step"], line[name]) for line in log if line[name] is not None]).reshape(-1, 2)
        axis = figure.add_subplot(3, 3, i, title=name)
        axis.plot(*points.T, "C0", alpha=0.3)
        axis.plot(points[:, 0], [points[max(0, at - half):at + half + 1, 1].mean() for at in range(len(points))], "C0")
    figure.savefig(file, dpi=80)
    return base64.b64encode(file.getvalue()).decode()

PAGE = Template("""<!doctype html><meta charset="utf-8"><title>sophia_min</title><style>
body{font:15px/1.5 sans-serif;max-width:1100px;margin:2em auto}img{max-width:100%}pre{overflow-x:auto}
section{border:1px solid #ddd;padding:1em;margin:1em 0}section>img{min-width:112px;image-rendering:pixelated}
td,th{padding:.3em .7em;text-align:left;vertical-align:top}span{padding:.1em .5em}
.right{background:#ffd98a}.right.praised{background:#dff2df}.wrong{background:#eee}.wrong.praised{background:#f7c4c4}
.mistrusted{background:#b3261e;color:#fff}</style>
<h1>sophia_min: {{ name }}</h1><p>{{ chosen }}<h2>Held-out questions</h2><pre>{{ table }}</pre>
<h2>Training, by step</h2>{% if missing %}<p>No curves, as matplotlib can't be imported ({{ missing }}): pip install
matplotlib{% else %}<p>Pale: each step in log.jsonl; dark: the mean over {{ 2 * half + 1 }} steps around it.
<p><img src='data:image/png;base64,{{ png }}'>{% endif %}
<h2>Some groups</h2><p><span class="right praised">right, thinking scored 0.5 or more</span>
<span class=right>right, but thinking scored below</span> <span class=wrong>wrong</span>
<span class="wrong praised">wrong, but thinking scored 0.5 or more</span>
<span class=mistrusted>gamma below 1: wrong answers got the better thinking scores</span>
<p>R^o: outcome, R^t: thinking, R: both (Eq. 5), A: advantage (Eq. 6). The lowest gammas of each step shown.
{% for group in groups %}<section>
<h3>step {{ group.step }}: {{ group.problem }} {{ group.options | join(" ") }} (truth: {{ group.solution }})
{% if group.gamma %}<span class="{{ "mistrusted" if group.gamma < 1 }}">gamma {{ "%.2f" % group.gamma }}</span>
{% else %}not scored{% endif %}</h3>
{% if group.thumbnail %}<img src='data:image/png;base64,{{ group.thumbnail }}'>{% endif %}
<table><tr><th>response<th>R^o<th>R^t<th>R<th>A
{% for r in group.responses %}
{% set praised = (r.outcome if r.thinking is none else r.thinking) >= 0.5 %}
<tr class="{{ "right" if r.outcome >= 0.5 else "wrong" }}{{ " praised" if praised }}"><td>{{ r.response }}
{% for n in (r.outcome, r.thinking, r.reward, r.advantage) %}<td>{{ "-" if n is none else "%.2f" % n }}{% endfor %}
{% endfor %}
</table></section>{% endfor %}
""", autoescape=True, trim_blocks=True)

def write_report(out):
    """report.html, one self-contained page, from what a run left in `out`."""
    if RANK > 0:
        return
    out, log = Path(out), read_lines(Path(out) / "log.jsonl")
    settings, results = (json.loads((out / name).read_text()) for name in ("config.json", "eval.json"))
    training = {"half": len(log) // 20}  # a running mean goes so far to either side: a tenth of the steps
    try:
        training["png"] = curves(log, training["half"])
    except ImportError as error:
        training["missing"] = str(error)
    chosen = ", ".join(f"{name} {settings[name]}" for name in "model reward_model trust alpha steps seed".split())
    write_atomic(out / "report.html", PAGE.render(name=out.name, chosen=chosen, table=table(results), **training,
                                                  groups=read_lines(out / "groups.jsonl")))
