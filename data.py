"""What goes into sophia_min and what comes out."""
import base64
import difflib
import fcntl
import functools
import glob
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
import threading
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from html import escape
from itertools import groupby
from pathlib import Path
from reprlib import repr as show  # any value on one short line, nesting cut: a row may hold anything
from statistics import fmean, stdev

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (AutoTokenizer, GenerationConfig, HfArgumentParser, PreTrainedTokenizerFast, Qwen2_5_VLConfig,
                          Qwen2_5_VLForConditionalGeneration)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import cached_file

# One process, or several under torchrun: each computes its share, and rank 0 alone writes and shows.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
progress = functools.partial(tqdm, disable=RANK > 0)

# the paper's Table 4, as sophia_min.CRITERIA asks for them
FAULTS = ("logical soundness", "correct reasoning", "error identification", "language consistency", "redundancy")


# ---------------------------------------------------------------- the command line

class Parser(HfArgumentParser):
    """Flags from a dataclass; an error is one line that says what was meant."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; --help lists all\n")

    def parse(self, argv, **defaults):
        """What the command line says, over other defaults than the dataclass's own: a dataclass, or a namespace."""
        self.set_defaults(**defaults)
        settings, unknown = self.parse_args_into_dataclasses(argv, True, look_for_args_file=False)
        if unknown:
            commands = [command for action in self._actions if type(action.choices) is dict
                        for command in action.choices.values()]
            known = [option for parser in (self, *commands) for option in parser._option_string_actions]
            near = difflib.get_close_matches(unknown[0], known, 1)
            self.error(f"{unknown[0]}: there is no such option" + (f"; do you mean {near[0]}?" if near else ""))
        return settings


def stored_settings(folder, known, parser):
    """The settings of the run in `folder`, for --resume; ends in one line where there is none to continue."""
    for name in ("config.json", "eval.json", "checkpoint/state.pt"):
        if not Path(folder, name).exists():
            parser.error(f"--resume {folder}: no {name} there, so no run to continue; start one in another --out")
    try:
        settings = json.loads(Path(folder, "config.json").read_text())
        other = set(settings) ^ set(known)
    except (OSError, ValueError, TypeError) as error:
        parser.error(f"--resume {folder}: config.json can't be read: {error}")
    if other:
        parser.error(f"--resume {folder}: config.json is another version's: {', '.join(other)}")
    return settings | {"resume": str(folder), "out": str(folder)}


class StopAfterStep:
    """For `with`: Ctrl-C asks for an end after the current step; a second one ends at once."""
    asked = False

    def __enter__(self):
        self.before, self.main = signal.getsignal(signal.SIGINT), threading.current_thread() is threading.main_thread()
        if self.main:
            signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_):
        if self.main:
            signal.signal(signal.SIGINT, self.before)

    def _ask(self, *_):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)


# ---------------------------------------------------------------- rows and pictures

PROBLEM_TYPES = ("numerical", "multiple choice", "OCR", "free-form", "text")  # paper, section 3.1

PICTURE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow has more: an .eps starts Ghostscript
REFUSED_FORMATS = ("AVIF", "JPEG2000")
# How a whole file ends; for WEBP Pillow compares the length in the header when it opens the file.
PICTURE_END = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b"\0;", "WEBP": b""}
# What Pillow raises on damaged files, found by changing bytes at random: there is no common base class.
PICTURE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, RuntimeError, struct.error, Image.DecompressionBombError)
TURN = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE,
        6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90}  # EXIF orientation -> upright


class DataError(ValueError):
    """Something is wrong with the user's data; the message is all that they need: what, where, and what next."""


@dataclass(frozen=True)
class Example:
    """One question of the training set, checked."""
    id: str
    problem: str
    problem_type: str  # one of PROBLEM_TYPES
    options: tuple[str, ...]  # () where there is nothing to choose
    solution: str  # the truth, without <answer> tags
    image: str | None  # a path, None for a text-only question
    source: str
    soundness: Callable[[str], float] | None = field(default=None, compare=False, repr=False)  # the toy's oracle
    critique: Callable[[str], str] | None = field(default=None, compare=False, repr=False)  # and how it says why


@contextmanager
def _pillow(path):
    """An opened picture, its header read, if Pillow shows its pixels as a person sees them; else DataError."""
    try:  # a stream, since Pillow maps a named TIFF into memory with its sides swapped
        with open(path, "rb") as file, Image.open(file, formats=PICTURE_FORMATS + REFUSED_FORMATS) as picture:
            tags = getattr(picture, "tag_v2", {})  # a TIFF's; 258: bits of a sample, 262: is 0 white
            if (picture.format in REFUSED_FORMATS
                    or picture.mode in ("I", "F") and picture.format != "PPM"  # 32 bits: nothing says what white is
                    or picture.mode[0] == "I" and (tags.get(258, (16,)) != (16,) or tags.get(262) == 0)
                    or "transparency" in picture.info and picture.tile[0].args in ("L;2", "L;4", "RGB;16B")):
                raise ValueError(f"{picture.format}, {picture.mode}: save it as 8-bit PNG or JPEG")
            yield picture
    except PICTURE_ERRORS as error:
        raise DataError(f"path: {str(path)!r} can't be read as a picture: {error!r}") from error


def open_picture(path):
    """The picture as a person sees it: 8-bit RGB, upright (EXIF), white where transparent, the first frame.

    16-bit grey keeps its range: 65535 is white (255 is, if no value is above it).
    Raises DataError, naming the file, if it can't be decoded, or not for sure. Damage in the middle of a PNG is found;
    that of other files often isn't: JPEG has no checksums, and Pillow drops libjpeg's warnings."""
    with _pillow(path) as picture:
        if picture.format == "PNG":
            picture.verify()  # its checksums: 3% of the time that decoding takes
    with _pillow(path) as picture:
        picture.load()
        try:
            turn = TURN.get(picture.getexif().get(0x112))  # ImageOps.exif_transpose dies of other, odd tags
        except SyntaxError:
            turn = None  # unreadable EXIF: viewers show the picture as stored, and so do we
        if picture.mode.startswith("I"):  # 16 bits, as "I;16" or (PGM) as "I": convert("RGB") would clip at 255
            values = np.asarray(picture).astype(np.float64)
            grey = (values / (65535 if values.max() > 255 else 255) * 255).round().astype(np.uint8)
            grey[values == picture.info.get("transparency")] = 255
            rgb = Image.fromarray(grey).convert("RGB")
        elif picture.has_transparency_data and not (picture.format == "BMP" and picture.getextrema()[3] == (0, 0)):
            rgba = picture.convert("RGBA")
            rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        else:
            rgb = picture.convert("RGB")
        return rgb.transpose(turn) if turn is not None else rgb


def check_picture(root, name, max_aspect, max_image_pixels, min_side):
    """The real path of picture `name` (a row's path) in the folder `root`; DataError if training couldn't use it.

    Reads the header and the last bytes (0.1 ms): damage in the middle of a file shows in `open_picture`, if at all."""
    file = os.path.realpath(os.path.join(root, name))  # realpath: a link could lead anywhere
    if os.path.isabs(name) or ".." in name.split("/") or not file.startswith(os.path.join(root, "")):
        raise DataError(f"path: {name!r} must stay inside {root!r}: no absolute path, no '..', no link out of it")
    if not os.path.isfile(file):
        twins = {unicodedata.normalize(form, file) for form in ("NFC", "NFD")} - {file}
        twin = "; one there has this name in another Unicode form: rename it" if any(map(os.path.isfile, twins)) else ""
        raise DataError(f"path: there is no file {name!r} in {root!r}{twin}")
    with _pillow(file) as picture:
        (width, height), kind = picture.size, picture.format
        picture.fp.seek(-8, os.SEEK_END)  # the smallest file that Pillow opens, a PPM, has 8 bytes
        end = picture.fp.read()
    if min(width, height) < min_side:
        raise DataError(f"path: {name!r} has {width} x {height} pixels, less than {min_side} on a side")
    if width * height > max_image_pixels:  # before anything decodes it: 18 KB can hold 144 megapixels
        raise DataError(f"path: {name!r} has {width} x {height} pixels, more than {max_image_pixels:,} in all")
    if max(width, height) > max_aspect * min(width, height):
        raise DataError(f"path: {name!r} has {width} x {height} pixels, an aspect ratio above {max_aspect}")
    # A truncated file has a fine header. One that ends as it should is whole; any other is decoded to be sure, as
    # some cameras append data of their own.
    if not end.endswith(PICTURE_END.get(kind, ())):
        open_picture(file)
    return file


def load_examples(path, image_root=None, *, skip_bad=False, skipped_path=None, max_aspect=200,  # the image processor's
                  max_image_pixels=100_000_000, min_side=1, bar=True):  # ours
    """The rows of a file in the paper's format (section 3.1), .json or .jsonl, as a list of checked Examples.
    image_root: the folder that the rows' paths start from (default: the file's). The pixels stay in their files.
    skip_bad: leave bad rows out, say how many, and list them with the reason in skipped_path (default: skipped.jsonl
    beside the file). Rows count from 1; in a .jsonl file a row's number is its line.
    Raises DataError if the file can't be read, a row is bad (without skip_bad), or no row is left."""
    path = Path(path)
    root = os.path.realpath(path.parent if image_root is None else image_root)
    if not os.path.isdir(root):
        raise DataError(f"image_root: {root!r} is not a folder")
    rows, examples, bad, ids = _read_rows(path), [], [], {}
    # cached: many questions share a picture
    find_picture = functools.cache(lambda name: check_picture(root, name, max_aspect, max_image_pixels, min_side))
    for number, row in tqdm(rows, desc="checking rows", delay=1, leave=False, disable=not bar or RANK > 0):
        try:
            row = _parse(row) if path.suffix.lower() == ".jsonl" else row
            examples.append(_check_row(row, number, ids, find_picture))
        except DataError as error:
            name = show(row["problem_id"]) if isinstance(row, dict) and "problem_id" in row else "no id"
            bad.append({"reason": f"{path}: row {number} ({name}): {error}", "row": row})

    report = [f"{path}: {len(bad)} of {len(rows)} rows are bad", *(entry["reason"] for entry in bad[:20])]
    if len(bad) > 20:
        report.append(f"... and {len(bad) - 20} more")
    if bad and not skip_bad:
        raise DataError("\n".join([*report, "Correct them, or leave them out with --skip_bad."]))
    if bad:
        skipped = Path(skipped_path or path.with_name("skipped.jsonl"))
        try:
            write_atomic(skipped, "".join(json.dumps(entry) + "\n" for entry in bad))
        except (OSError, RecursionError) as error:  # a row nested as deep as can just be read can't be written
            raise DataError(f"the list of bad rows can't be written, give it another place: {error}") from error
        print(f"{path}: left out {len(bad)} of {len(rows)} rows, listed in {skipped}")
    if not examples:
        raise DataError("\n".join([*report, "No row is left: correct them, or give another file."]))
    return examples


def _read_rows(path):
    """Numbered rows: parsed for .json, still text for .jsonl, where a broken line is one bad row."""
    kind = path.suffix.lower()
    if path.is_dir() or kind not in (".json", ".jsonl"):
        raise DataError(f"{path}: must be one .json or .jsonl file; save parquet's pictures as files, and its rows "
                        "with pandas: read_parquet(...).to_json('rows.jsonl', orient='records', lines=True)")
    try:
        text = path.read_bytes().decode("utf-8-sig")  # with or without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read as UTF-8 text: {error}") from error
    if kind == ".jsonl":  # not splitlines(), which also cuts at U+2028 inside a string
        rows = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        try:
            content = _parse(text) if text.strip() else []
        except DataError as error:
            raise DataError(f"{path}: {error}; if it has one row a line, call it .jsonl") from error
        if not isinstance(content, list):
            raise DataError(f"{path}: must hold a list of rows, not {show(content)}")
        rows = list(enumerate(content, 1))
    if not rows:
        raise DataError(f"{path}: is empty, it has no rows")
    return rows


def _parse(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # not only JSONDecodeError: a number of 5,000 digits, [[[[...
        raise DataError(f"broken JSON: {error}") from error


OTHER_NAMES = {"path": ("image", "images", "image_path", "img"), "solution": ("answer", "answers", "ground_truth"),
               "problem": ("question", "prompt"), "problem_id": ("id", "question_id")}  # elsewhere


def _text(row, name):
    if name not in row:
        near = [other for other in OTHER_NAMES.get(name, ()) if other in row]
        raise DataError(f"{name}: is missing" + (f"; {near[0]!r} looks like it: rename that" if near else ""))
    if not isinstance(row[name], str) or not row[name].strip():
        raise DataError(f"{name}: must be text, is {show(row[name])}")
    if re.search("[\0\ud800-\udfff]", row[name]):  # half a character: tokenizers and file systems raise
        raise DataError(f"{name}: holds a lone surrogate or a zero byte: {show(row[name])}")
    return row[name]


def _check_row(row, number, ids, find_picture):
    """One row as an Example; DataError, "field: what is wrong", at its first fault. Adds the row's id to `ids`."""
    if not isinstance(row, dict):
        raise DataError(f"row: must be an object with the paper's fields, is {show(row)}")
    # type() is int: true is an int too for isinstance
    id = str(row["problem_id"]) if type(row.get("problem_id")) is int else _text(row, "problem_id")
    if ids.setdefault(id, number) != number:
        raise DataError(f"problem_id: row {ids[id]} has it already")
    for name, known in (("problem_type", PROBLEM_TYPES), ("data_type", ("image", "text"))):
        if _text(row, name) not in known:
            raise DataError(f"{name}: {show(row[name])} is not one of {', '.join(known)}")

    problem, solution = _text(row, "problem"), _text(row, "solution")
    if problem.count("<image>") > (row["data_type"] == "image"):
        raise DataError(f"problem: has more <image> tags than pictures: {show(problem)}")
    problem = problem.replace("<image>", "").strip() if "<image>" in problem else problem  # the picture comes first
    if tagged := re.search("(?is)<answer>(.*)</answer>", solution):
        solution = tagged[1]
    if not visible(solution) or re.search("(?i)</?(answer|think)>", solution):
        raise DataError(f"solution: must hold one answer, is {show(row['solution'])}")
    options = [] if row.get("options") is None else row["options"]  # exports write null for an empty list
    if not isinstance(options, list):
        raise DataError(f"options: must be a list, is {show(options)}")
    options = [_text({"options": option}, "options").strip() for option in options]
    _check_truth(row["problem_type"], solution.strip(), options)
    if row["data_type"] == "text" and row.get("path"):
        raise DataError(f"path: is {show(row['path'])}, but data_type is text")
    image = find_picture(_text(row, "path")) if row["data_type"] == "image" else None
    source = _text(row, "data_source") if row.get("data_source") else ""
    return Example(id, problem, row["problem_type"], tuple(options), solution.strip(), image, source)


def _check_truth(problem_type, truth, options):
    """DataError if no answer could win: the truth, answered, must earn 1. (Words always equal themselves.)"""
    if problem_type == "numerical" and len(truth) > LONGEST:
        raise DataError(f"solution: has {len(truth)} characters, no number or short text has more than {LONGEST}")
    if problem_type == "multiple choice" and len(set(options)) < max(2, len(options)):
        raise DataError(f"options: must be two or more, all different, are {show(options)}")
    if problem_type == "multiple choice" and not chosen_options(truth, options):
        raise DataError(f"solution: {show(truth)} is none of the options {show(options)}, or not only one")


# ---------------------------------------------------------------- prompts

# Our own words; the paper asks for this format (section 3.1) and lets each problem type add a sentence.
SYSTEM_PROMPT = "First think step by step in <think></think>, then give only the final answer in <answer></answer>."
ANSWER_FORM = {
    "numerical": "Answer with one number.",
    "multiple choice": "Answer with the letter of the right option.",
    "OCR": "Answer with the text as it is written.",
    "free-form": "Answer in a few words.",
    "text": "Answer in a few words.",
}
PICTURE = object()  # a message's part that is the picture
STAND_IN = "\N{OBJECT REPLACEMENT CHARACTER}"  # for text, while a chat template is rendered
MODEL_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, SafetensorError,
                TemplateError)  # what loading raises for files that are odd or damaged


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
    """The Prompt of a picture of one token, for nobody to continue."""
    vision = config.vision_config
    side, values = vision.spatial_merge_size, vision.in_channels * vision.temporal_patch_size * vision.patch_size ** 2
    return Prompt([config.vision_start_token_id, config.image_token_id, config.vision_end_token_id],
                  torch.zeros(side * side, values), torch.tensor([[1, side, side]]))


class Processor:
    """Turns text and a picture into a Prompt by the model's own chat template: tokenizer and image processor, without
    the rest of AutoProcessor, whose video part needs torchvision."""

    def __init__(self, tokenizer, image_processor, max_pixels=None):
        self.tokenizer, self.image_processor = tokenizer, image_processor
        if max_pixels:
            least = min(image_processor.size["shortest_edge"], max_pixels)
            image_processor.size = {"shortest_edge": least, "longest_edge": max_pixels}
        self.image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.special = re.compile(f"({'|'.join(map(re.escape, special))})")
        self.picture = functools.lru_cache(maxsize=64)(self.picture)  # the judge sees the pictures of the policy
        self._rendered = functools.lru_cache(maxsize=64)(self._rendered)
        probe = (("system", (STAND_IN,)), ("user", (PICTURE, STAND_IN)), ("assistant", (STAND_IN,)))
        try:
            pieces = self._rendered(probe)
        except (ValueError, TypeError, TemplateError) as error:
            raise ValueError(f"its chat template (chat_template.jinja or tokenizer_config.json): {error}") from error
        turns = [i for i, piece in enumerate(pieces) if STAND_IN in piece]
        if "<|image_pad|>" not in pieces or len(turns) != 3 or not self.special.fullmatch(pieces[turns[2] + 1]):
            raise ValueError("its chat template doesn't show a system message, a picture and the end of a turn.")
        self.turn_end = tokenizer.convert_tokens_to_ids(pieces[turns[2] + 1])
        self.opening = "<think>" * "".join(pieces).rstrip().endswith("<think>")  # a tag that the template has written

    @classmethod
    def from_pretrained(cls, name, max_pixels=None):
        """The processor of a Hugging Face id or folder. Raises one of MODEL_ERRORS where there is none that will do."""
        tokenizer = AutoTokenizer.from_pretrained(name)
        if template := cached_file(name, "chat_template.json", _raise_exceptions_for_missing_entries=False):
            tokenizer.chat_template = json.loads(Path(template).read_text())["chat_template"]  # it wins, as elsewhere
        return cls(tokenizer, Qwen2VLImageProcessorPil.from_pretrained(name), max_pixels)

    def save_pretrained(self, folder):
        """Write both parts in Hugging Face format."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    def picture(self, path):
        """(pixel_values [patches, 1176], grid [1, 3]) of a picture file, as a person sees it."""
        features = self.image_processor([open_picture(path)], return_tensors="pt")
        return features["pixel_values"], features["image_grid_thw"]

    def encode(self, text):
        """Token ids of text: what looks like a special token in it stays text."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids, ends):
        """The text of token ids, without those that end a response (or fill it up behind its end)."""
        return self.tokenizer.decode([id for id in ids.tolist() if id not in ends])

    def chat(self, messages, image=None):
        """The Prompt of a conversation in which the assistant speaks next; messages: (role, part, ..), parts being text
        or PICTURE, which is left out where `image` is None. The template sees stand-ins: no text can end a turn.
        Text between special tokens is encoded in one piece, as the official processor does."""
        shown = tuple((role, tuple(part if part is PICTURE else STAND_IN for part in parts
                                   if part is not PICTURE or image is not None)) for role, *parts in messages)
        texts, ids = iter([part for _, *parts in messages for part in parts if part is not PICTURE]), []
        for piece in self._rendered(shown):
            if self.special.fullmatch(piece):
                ids.append(self.tokenizer.convert_tokens_to_ids(piece))
            else:
                ids += self.encode(re.sub(STAND_IN, lambda _: next(texts), piece))
        if image is None:
            return Prompt(ids)
        pixel_values, grid = self.picture(image)
        at, tokens = ids.index(self.image_token), int(grid.prod()) // self.image_processor.merge_size ** 2
        return Prompt(ids[:at] + [self.image_token] * tokens + ids[at + 1:], pixel_values, grid)

    def _rendered(self, shown):
        content = [{"role": role, "content": STAND_IN if parts == (STAND_IN,) else [
            {"type": "image"} if part is PICTURE else {"type": "text", "text": part} for part in parts]}
            for role, parts in shown]
        text = self.tokenizer.apply_chat_template(content, tokenize=False, add_generation_prompt=True)
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
    """The Examples whose prompts fit into config.max_prompt_tokens. Others raise DataError, or with config.skip_bad are
    left out and listed; nothing is ever cut, since a cut picture would be another one."""
    longest, skipped = config.max_prompt_tokens, Path(config.out, "skipped.jsonl")
    bar = progress(examples, desc="measuring prompts", delay=2, leave=False)
    lengths = [processor.length(example) for example in bar]
    bad = [f"row with problem_id {example.id}: problem: its prompt has {n:,} tokens, more than {longest:,}"
           for example, n in zip(examples, lengths) if n > longest]
    kept = [example for example, n in zip(examples, lengths) if n <= longest]
    if bad and not (config.skip_bad and kept):
        more = [f"... and {len(bad) - 20} more"] * (len(bad) > 20)
        raise DataError("\n".join([*bad[:20], *more, "Shorten them, lower --max_pixels, raise --max_prompt_tokens, or "
                                   "leave them out with --skip_bad."]))
    for reason in bad:
        append_line(skipped, json.dumps({"reason": reason}))
    if bad:
        print(f"left out {len(bad)} rows whose prompts are too long, listed in {skipped}")
    return kept


def load_sets(config):
    """(training Examples, held-out Examples, one line that says which) of a run."""
    if config.data in TOY_SETS:
        size, pictures = config.toy_pixels, Path(config.out, "pictures")
        try:
            pictures.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"--out {config.out}: can't be written: {error}") from error
        train, held_out = TOY_SETS[config.data]
        sets = {part: toy_examples(2000 if part in TRAINED else 400, config.seed, part, size, pictures)
                for part in (train, held_out)}
        return sets[train], sets[held_out], (f"{len(sets[train])} toy questions ({train}), pictures of {size} x {size} "
                                             f"pixels; evaluated on {len(sets[held_out])} ({held_out})")
    examples = load_examples(config.data, config.image_root, skip_bad=config.skip_bad,
                             skipped_path=Path(config.out, "skipped.jsonl"))
    if config.eval_only or len(examples) < 100:
        return examples, examples, f"{len(examples)} rows of {config.data}; evaluated on the same rows"
    shuffled = random.Random(config.seed).sample(examples, len(examples))
    held_out = min(400, len(examples) // 10)
    return shuffled[held_out:], shuffled[:held_out], f"{len(examples)} rows of {config.data}; held out: {held_out}"


def questions_of(step, n, per_step, seed):
    """Which questions step 1, 2, .. takes: every pass over the data in a new order, so that a step's number is all that
    a resumed run needs to know."""
    places = range((step - 1) * per_step, step * per_step)
    orders = {epoch: random.Random(f"{seed} {epoch}").sample(range(n), n) for epoch in {i // n for i in places}}
    return [orders[i // n][i % n] for i in places]


def digest(examples):
    """What tells rows apart from others: a hash of what they ask and of what is right."""
    rows = [(e.id, e.problem, e.problem_type, e.options, e.solution) for e in examples]
    return hashlib.sha256(repr(rows).encode()).hexdigest()


# ---------------------------------------------------------------- text measures

# A number or an option is read into tokens once: numbers, names, signs, units, brackets, in one spelling for what
# Unicode, LaTeX and Markdown write in many (`read`), and without what makes no difference (`fold`): sloppy capitals,
# brackets that only group. Then numbers compare as numbers, all else as tokens. Tokens are text with spaces between.

LONGEST = 400  # characters; a longer text is no number: its tokens are its words, and no pattern below sees it
UNSEEN = re.compile("[\xad\u034f\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff]")
SAME_SIGN = str.maketrans("−–—‐‒―⁄∕∶×·⋅∙٫٬،。٪º˚‘’′“”″", "------//:****.,,.%°°'''\"\"\"")
FORMS = {"<super>": "^{%s}", "<sub>": "_{%s}", "<fraction>": r"\frac{%s}"}  # NFKC alone: ³ is 3, ₂ is 2, 1½ is 11/2
GREEK = {unicodedata.name(chr(i)).split()[-1].lower().replace("lamda", "lambda"): chr(i) for i in range(0x3b1, 0x3ca)}
SIGNS = GREEK | {name.capitalize(): letter.upper() for name, letter in GREEK.items()} | {
    "frac": r"\frac", "font": r"\font"} | {name[:-1]: name[-1] for name in r"""times* cdot* ast* div÷ pm± mp∓ le≤ leq≤
    ge≥ geq≥ ne≠ neq≠ lt< gt> approx≈ sim~ equiv≡ cong≅ infty∞ angle∠ triangle△ circ° degree° prime' parallel∥ perp⊥ in∈
    notin∉ cup∪ cap∩ subset⊂ subseteq⊆ emptyset∅ to→ rightarrow→ leftarrow← uparrow↑ downarrow↓ colon: {⦃ }⦄ varphiφ
    varepsilonε sqrt√""".split()}
SAME_WORD = GREEK | {"sqrt": "√", "''": '"', "<=": "≤", ">=": "≥", "!=": "≠", "- ": "–"}  # –: a dash between spaces
SAME_LATEX = [(re.compile(pattern), plainer) for pattern, plainer in [
    (r"(?<!\\)\$([^$]*)\$", r" \1 "), (r"\{,\}|,\\! ?", ","), (r"\\!|`", ""),  # $5$, $$5$$; a lone $ is money
    (r"\\[dtc]frac", r"\\frac"), (r"\\(?:boxed|fbox|mbox|(?:text|math)[a-z]*|operatorname|emph|rm|bf|it|sf|displaystyle"
                                  r"|left|right|[bB]igg?|small|large)(?![a-zA-Z])", r"\\font"),
    (r"\\[,;: ()\[\]\\]|\\q?quad(?![a-z])|(?<=\S)~", " "),
    (r"\^ ?(?:\{ ?((?:\\circ|\\degree|\\prime|[°'])+) ?\}|(?=\\circ|\\degree|\\prime|[°']))", r"\1 "),
    (r"(?<![^\s(\[])\*{1,3}(?=\S)|(?<=\S)(?:\*{2,3}(?!\w)|\*$)", "")]]  # **bold**, *italic*
ANSWER_IS = re.compile(r"^(?:(?:so|thus|hence|therefore),? )?(?:the |my )?(?:(?:final|correct|right|best) )*"
                       r"(?:(?:answer|option|choice)s? ?(?:is\b:?|[:=])|(?:option|choice)s?(?= )) ?|^答案[是为]?:? ?", re.I)
DIGITS = r"(?:(?<![(\[,])(?<!\\\{)[1-9]\d{0,2}(?:(?:,\d{3})+|(?: \d{3})+)(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+"
TOKEN = re.compile(r"\\[a-zA-Z]+|\\\S|(?<=frac)\d|(?<=frac )\d|(?<=frac\d)\d|(?<=frac \d)\d|"                # \frac12
                   rf"(?:{DIGITS})(?:[eE][+-]?\d{{1,3}}(?!\d))?|(?<= )- |[A-Z]{{0,2}}\$|''|[<>!]=|"
                   r"(?:[a-z](?:\.[a-z])+|[A-Z](?:\.[A-Z])+)\b|W(?:'W)*|\S".replace("W", r"[^\W\d_Α-Ψα-λν-ω]+"))
GROUPS = [(re.compile(pattern), plainer) for pattern, plainer in [  # LaTeX's, the innermost first
    (r"\\frac (?!\{)(\S+) ", r"\\frac { \1 } "), (r"(\\frac \{ [^{}]*\} )(?!\{)(\S+) ", r"\1{ \2 } "),
    (r"(\d+ )\\frac \{ (\d+ )\} \{ (\d+ )\} ", r"\1\2/ \3"),
    (r"\\frac \{ ([^{}]*)\} \{ ([^{}]*)\} ", r"( ( \1) / ( \2) ) "), (r"([_^√] )\{ ([^{}]*)\} ", r"\1( \2) "),
    (r"(?<!\\frac )(?<!\} )\{ ([^{},]*)\} ", r"\1"), (r"\\font \{ ([^{}]*)\} ", r"\1"),
    (r"(?<!\\f... )(?<!\} )\{ ([^{},]*,[^{}]*)\} ", r"⦃ \1⦄ "), (r"\\font (?!\{)", "")]]
SHORT_WORDS = set("am pm no ok up in on at to of or is it as by do go he if me my us be we so an".split())
IDLE = [(re.compile(pattern), plainer) for pattern, plainer in [                                             # brackets
    (r"(?<!\S)(?:and|[&,、])(?: (?:and|[&,、]))*(?!\S)", ","), ("–", "-"), (r"(?<!\S)A (?=[^\W\d_]{3})", "a "),
    (r"^([A-Z]) = (?=\()", r"\1 "), (r"([_^√]) \( (\S+) \)", r"\1 \2"), (r"\^ \( ([+-] \S+) \)", r"^ \1"),   # 10^(-5)
    (r"""(?<![\w)\]'"°∞] )\( (\S+) \)(?! [\w(√^_])""", r"\1"),                                               # (5)
    (r"""(?<![\w)\]'"°∞/_^√] )\( ([^()+=<>≤≥≠≈,:;±∓÷→-]*) \)(?! [\w(√^_/])""", r"\1"),                       # -(1/2)
    (r"""(?<![\w)\]'"°∞/_^√] )\( ((?:- )?[^()+=<>≤≥≠≈,:;±∓÷→/-]*) \)(?= /)""", r"\1"),                       # (2x)/3
    (r"^\( ((?:[^(),;]|\([^()]*\))*) \)$", r"\1"), (r"^\[ ([^()\[\],;]*) \]$", r"\1")]]


def visible(text: str) -> str:
    """The text without the characters that nobody sees: zero-width spaces, soft hyphens, a byte order mark."""
    return UNSEEN.sub("", text).strip()


@functools.lru_cache(512)
def read(text: str) -> str:
    """The tokens of a number or an option, in one spelling; the words of a text too long for either."""
    runs = groupby(text[:LONGEST].translate(SAME_SIGN), lambda c: unicodedata.decomposition(c).split(" ")[0])
    plain = "".join(FORMS.get(kind, "%s") % unicodedata.normalize("NFKC", "".join(run)).replace("⁄", "}{")
                    for kind, run in runs)
    if len(text) > LONGEST or len(plain) > 2 * LONGEST:
        return " ".join(re.findall(r"\w+|[^\w\s]", text.lower().strip(" .")))
    text = visible("".join(str(unicodedata.decimal(c, c)) for c in plain.translate(SAME_SIGN)))  # ٥ is 5
    for pattern, plainer in SAME_LATEX:
        text = pattern.sub(plainer, text)
    text = " ".join(text.split())
    for _ in range(4):  # wrappers come in wrappers: **"5"**
        text = ANSWER_IS.sub("", re.sub(r"(?<=[^.])\.$", "", text.strip(" _")))
        text = text[1:-1] if len(text) > 2 and text[0] == text[-1] and text[0] in "\"'" else text
    text = "".join((SIGNS.get(token[1:], token[1:]) if token[0] == "\\" and token[1:] else SAME_WORD.get(
        token, token.replace(" ", "").replace(",", "") or ",")) + " " for token in TOKEN.findall(text))
    for pattern, plainer in GROUPS * min(12, text.count("{") + text.count(r"\f")):
        text = pattern.sub(plainer, text)
    return text.strip()


def _plain_word(m: re.Match) -> str:
    word, plain = m[0].lower().replace(".", ""), m[0] in (m[0].lower(), m[0].upper(), m[0].capitalize())  # p.m.
    return word if word in SHORT_WORDS or len(word) > 2 and plain and m[0] not in UNITS else m[0]


@functools.lru_cache(512)
def fold(tokens: str) -> str:
    """Tokens without what makes no difference: capitals of plain words, 'and' in a list, idle brackets."""
    if len(tokens) > 4 * LONGEST:
        return tokens
    tokens = re.sub(r"(?<!\S)[^\W\d_]\S*", _plain_word, tokens)
    for pattern, plainer in IDLE * 4:  # brackets in brackets
        tokens = pattern.sub(plainer, tokens)
    return tokens


SCALES = {"hundred": 100, "thousand": 10 ** 3, "million": 10 ** 6, "billion": 10 ** 9, "trillion": 10 ** 12}
NAME = r"(?:m )?((?:[∠△Δ] )?W(?: [∠△] W)?(?: N)?(?: _ (?:W|N|\( (?:[∠△] )?W \)))?(?: ['\"])*(?: \( \w+ \))?|∠ N) = "
NAME = NAME.replace("W", r"[^\W\d_π]+").replace("N", r"\d+")
MONEY = r"[A-Za-z]{0,2}[$£¥₠-⃀]|usd|eur|gbp|jpy|cny|rmb|inr|krw|[Rr]s"
DECIMAL, POWER = r"\d*\.?\d+(?:[eE][+-]?\d+)?", r"\^ ((?:[+-] )?\d{1,3})"
VALUE = re.compile(
    rf"(?:{NAME})?([+-] )?(?:({MONEY}) (?:\. )?)?([+-] )?(\( )?(?=[\d.√π])(?:(\d+) (?=\d+ / \d))?"  # x = -$1 1/2
    rf"(?:([1-9]\d{{0,3}}) {POWER} |({DECIMAL}) (?:[*x] 10 {POWER} )?)?(?:\* )?(?:√ (\d+) )?(?:\* )?(π )?"  # 2^10, 2√3
    rf"(?:/ (\( )?(?=[\d.√π])(?:({DECIMAL}) )?(?:\* )?(?:√ (\d+) )?(π )?(?(13)\) ))?"  # /4, /(2π)
    rf"(?(5)\) )(?:√ (\d+) )?(π )?(?:({'|'.join(SCALES)}) )?(.*)")
SI = ("m meter metre 米|g gram gramme 克|s second sec|L l liter litre 升|W watt|V volt|A amp ampere|J joule|N newton|bar"
      "|Pa pascal|Hz hertz|eV|mol mole|Ω ohm|cal calorie|Wh|K kelvin|C coulomb|F farad|T tesla|B byte").split("|")
PREFIXES = "k kilo 千|M mega|G giga|T tera|P peta|m milli 毫|c centi 厘|d deci|μ micro u|n nano|p pico|h hecto".split("|")
OTHERS = ("% percent pct|° degree deg 度|°C °c °celsius|°F °f °fahrenheit|mi mile|in inch inches \"|ft foot feet '"
          "|yd yard|lb pound|oz ounce|t ton tonne|min minute|h hr hour|day|week|month|year yr 岁|km 公里|kg 公斤|cup|rad"
          "|radian|unit|个|人|¢ cent|$ dollar usd US$|€ euro eur|£ pound gbp|yen jpy 円 ¥|yuan 元 cny rmb ¥|₹ rupee rs inr"
          "|₩ won krw")
UNITS, SLOPPY = {}, {}  # what a spelling may mean, as a pound is lb or £; the same by small letters
for group in [names.split() for names in OTHERS.split("|") + SI] + [
        [start + name for start in prefix.split() for name in names.split() if (len(start) > 2) == (len(name) > 3)]
        for prefix in PREFIXES for names in SI]:
    for form in group + [name + "s" for name in group if len(name) > 1]:
        UNITS.setdefault(form, set()).add(group[0])
        SLOPPY.setdefault(form.lower(), set()).add(group[0])
COUNTED = re.compile(r"(?:W )?(W)(?: of W(?: W)?)?".replace("W", r"[^\W\d_]{3,}"))  # 3 red cubes, 2 rolls of tape
PLURAL = re.compile(r"\w{2}[^\Ws]s$|^(?:people|men|women|children|mice|geese|teeth|feet|fish|sheep|deer|dice)$")
NOT_COUNTED = re.compile(
    r"\b(?:(?:less|minus|plus|this|perhaps|always|and|not|than|from|are|about|half|halves|third|quarter|ten|dozen|pair"
    r"|couple|score|mln|lakh|crore|gross|time|more|fewer|maybe|over|under|out|other|each|point|fold|hundred|thousand"
    r"|[mbtr]+illion)s?|\w*(?:four|fif|six|seven|eigh|nin|ten|twelf|teen|tie|hundred|sand|illion)ths?|\w+ly)\b")
SAME_UNIT = [(re.compile(pattern), plainer) for pattern, plainer in [
    (r"\b(?:square|sq(?: \.)?) ([^\W\d_]+)", r"\1^2"), (r"\bcubic ([^\W\d_]+)", r"\1^3"), (r" squared\b", "^2"),
    (r" cubed\b", "^3"), (r"(?:\* )?([^\W\d_]+) \^ - (?=\d)", r"/ \1^"), (r" \^ (?=\d)", "^"),
    (r"(?<=[^\W\d_]) (?=[23]\b)", "^"), (r"\bper cent\b", "%"), (r"\bper\b", "/"), (r"[*()] ?", ""),
    (r"\bmph\b", "mi / h"), (r"(?:\bdegrees?|°) (?=[cCfF]\b|celsius|fahrenheit)", "°"), (r"\bk(?:p|m)h\b", "km / h"),
    (r" (?:old|tall|long|wide|high|deep|thick)$", "")]]


def unit_names(word: str) -> set[str]:
    """What a unit, or a power of one, may mean in any spelling; with sloppy capitals too, if they leave no doubt."""
    name, power = re.fullmatch(r"(.*?)(\^\d)?", word).groups("")
    sloppy = len(name) > 1 and name in (name.lower(), name.upper(), name.title()) and SLOPPY.get(name.lower())
    money = {name} if re.fullmatch(MONEY, name) else set()
    return {found + power for found in UNITS.get(name) or (sloppy if sloppy and len(sloppy) == 1 else money)}


def parse_unit(text: str, one: bool) -> list[set[str]] | None:
    """What each word of a unit may mean, [] for no unit; counted things are their words; None if none of these."""
    if text[:1] == "/" or text in ("B", "C", "F", "K", "T"):  # 5 K may be 5000
        return None
    for pattern, plainer in SAME_UNIT:
        text = pattern.sub(plainer, text)
    unit = []
    for place, part in enumerate(text.split("/")):
        names, noun = [unit_names(word) for word in part.split()], COUNTED.fullmatch(part.strip())
        if not all(names) or not names and place:
            if not noun or NOT_COUNTED.search(part) or not (one or place or PLURAL.search(noun[1])):
                return parse_unit(text.lower(), one) if "/" in text and text.isupper() else None  # KM/H
            names = [{part.strip()}]
        unit += [{"/"}] * (place > 0) + names
    return unit


@functools.lru_cache(512)
def parse_number(tokens: str) -> tuple | None:
    """(name, unit, number) of folded tokens, where a number is its sign, its square (a fraction even for 2√3) and its
    power of π. Never a sum or a product."""
    m = VALUE.fullmatch(tokens + " ") if len(tokens) <= 3 * LONGEST else None
    if not m:
        return None
    (name, sign, money, inner_sign, _, whole, base, power, digits, ten, root, pi, grouped, below, root_below, pi_below,
     root_after, pi_after, scale, unit) = (part.strip() for part in m.groups(""))
    divisor, root_below = Fraction(below or 1), Fraction(root_below or 1)
    if (sign and inner_sign) or not divisor * root_below or not grouped and sum(map(bool, m.group(14, 15, 16))) > 1:
        return None
    number = Fraction(digits or 1) * Fraction(base or 10) ** int((power or ten or "0").replace(" ", "")) / divisor
    unit = "" if money and unit_names(unit) == unit_names(money) else unit  # $5 USD
    meaning = parse_unit(f"{money} {unit}".strip(), number == 1)
    if meaning is None or money and not re.match("$|per |/ ", unit) or whole and number >= 1:  # 1 3/2 is no number
        return None
    number = (number + int(whole or 0)) * SCALES.get(scale, 1)
    square = number ** 2 * Fraction(root or 1) * Fraction(root_after or 1) / root_below  # √12 = 2√3, 1/√2 = √2/2
    power_of_pi = bool(number) * (bool(pi) + bool(pi_after) - bool(pi_below))
    return name, meaning, (number > 0 and "-" not in sign + inner_sign, square, power_of_pi)


def _same(a: str, b: str) -> bool:
    def unnamed(text: str) -> str:  # P(2, 3) is a point
        return re.sub(r"^[A-Z] (?:' )?(?=\()", "", text) if text[-1:] == ")" and "," in text else text

    a, b = fold(a), fold(b)
    x, y = parse_number(a), parse_number(b)
    if not x or not y:
        return not x and not y and (a == b or unnamed(a) == b or a == unnamed(b))
    units = not x[1] or not y[1] or len(x[1]) == len(y[1]) and all(map(set.intersection, x[1], y[1]))
    return units and x[2] == y[2] and (x[0] == y[0] or not x[0] or not y[0])


def same_value(answer: str, truth: str) -> bool:
    """Equal numbers, where a name or unit that only one side states is no difference; or equal text, if neither is one:
    lists, points, ranges, ratios, times and dates. Nothing is evaluated."""
    return _same(read(answer), read(truth))


LABEL = re.compile(r"(?:(?:[(\[] (\w+) ([)\]])|(\w+))( [.)\]:,、–])?(?: |$))?(.*)")  # B, (B), B. 60, B (60), 2) cat


def _labelled(tokens: str) -> tuple[str, str, str]:
    bracketed, closing, label, separator, rest = LABEL.match(tokens).groups("")
    return (bracketed + label).upper(), closing or separator.strip(), rest


def lettered(options: Sequence[str]) -> tuple[dict[str, str], dict[str, str], bool]:
    """Texts of options by letter, the one they show or by place; letters by label, a letter or number; is any shown."""
    labels, separators, texts = zip(*map(_labelled, map(read, options))) if options else ((), (), [""] * 26)
    shown = "".join(sorted(labels)) in string.ascii_uppercase and len("".join(labels)) == len(options) and all(
        separator.strip(",") or not text for separator, text in zip(separators, texts))
    numbered = list(labels) == [str(i + 1) for i in range(len(options))] and all(s and s in ".)]、" for s in separators)
    letters = labels if shown and options else string.ascii_uppercase[:len(texts)]
    texts = dict(zip(letters, texts if shown or numbered else map(read, options)))
    return texts, dict(zip(letters, letters)) | (dict(zip(labels, letters)) if numbered else {}), shown or numbered


def chosen_options(answer: str, options: Sequence[str]) -> frozenset[str]:
    """The letters of the options that an answer names, by letter or by text; empty if it hedges or repeats itself."""
    texts, labels, shown = lettered(options)

    def named(part: str) -> str | None:
        part = re.sub("^(?:option|choice) ", "", part, flags=re.I)
        label, _, rest = _labelled(part)
        letter = labels.get(label)
        if letter and (_same(rest, texts[letter]) if rest else shown or label != part.upper()):
            return letter  # 'B' or 'B. 60', but not 'B' with another option's text
        for same in (str.__eq__, lambda a, b: fold(a) == fold(b), _same):  # to the letter, if options differ in case
            owners = [owner for owner, text in texts.items() if text and same(text, part)]
            if owners:
                return owners[0] if len(owners) == 1 else None
        return None if rest else letter

    tokens = read(answer) if len(answer) <= LONGEST + max(map(len, options), default=0) else ""
    in_order, capitals = list(tokens) == sorted(tokens), tokens.isupper()
    if named(tokens):
        parts = [tokens]
    elif tokens.isalpha() and (in_order or capitals if options else in_order and capitals):  # 'AC', but no other word
        parts = list(tokens)
    elif all(token.upper() in labels for token in tokens.split()):  # 'A C'
        parts = tokens.split()
    else:
        parts = [*filter(None, re.split(r"(?:(?:^| )(?:and|[&,;、])(?= ))+ ", f"{tokens} "))]
    chosen = [named(part.strip()) for part in parts] if len(parts) <= len(texts) else []
    return frozenset(chosen) if all(chosen) and len(set(chosen)) == len(chosen) else frozenset()


def word_places(words: list[str]) -> dict[str, int]:
    """For each word, a number with a one in bit i if the word stands at place i."""
    places = {}
    for i, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << i
    return places


def word_error_rate(answer: str, truth: str) -> float:
    """Word edits that turn the answer into the truth, per word of the truth; exact up to 20 (Myers' bit vectors)."""
    words, target = answer.split(), truth.split()
    if len(words) > 21 * len(target):  # a loop: the surplus alone is a rate above 20, and exp(-20) is 2e-9
        return (len(words) - len(target)) / len(target)
    places, full, edits = word_places(target), (1 << len(target)) - 1, len(target)
    up, down = full, 0  # bit i: in this column of the edit table, row i + 1 is one more, or one less, than row i
    for word in words:
        here = places.get(word, 0)
        diagonal = (((here & up) + up) ^ up) | here | down
        right_up, right_down = down | ~(diagonal | up) & full, diagonal & up
        edits += (right_up >> len(target) - 1) - (right_down >> len(target) - 1)
        right_up, right_down = (right_up << 1 | 1) & full, right_down << 1 & full
        up, down = right_down | ~(here | down | right_up) & full, right_up & (here | down)
    return edits / len(target)


def rouge_words(text: str) -> list[str]:
    """Lower-case runs of letters, marks and digits; one token a character where a script has no spaces."""
    def spaced(c: str) -> str:
        if unicodedata.name(c, "").startswith(("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")):
            return f" {c} "
        return c if unicodedata.category(c)[0] in "LMN" else " "

    if not text.isascii():  # one spelling of é; in short pieces, as NFC takes quadratic time on a run of accents
        text = re.sub(r"\S{1,50}", lambda m: unicodedata.normalize("NFC", m[0]), text)
    text = text.lower()
    words = text.translate({ord(c): spaced(c) for c in set(text)}).split()
    return words or text.split()  # a text of signs alone still equals itself


def longest_common_subsequence(a: list[str], b: list[str]) -> int:
    """Its length, bit-parallel: each zero bit of `free` is one more matched place of b."""
    places, full = word_places(b), (1 << len(b)) - 1
    free = full
    for word in a:
        if word in places:
            here = free & places[word]
            free = (free + here | free - here) & full
    return len(b) - free.bit_count()


def rouge(answer: str, truth: str) -> float:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L, over those that exist: two texts of one word have no ROUGE-2."""
    a, b = rouge_words(answer), rouge_words(truth)
    scores = [2 * longest_common_subsequence(a, b) / (len(a) + len(b))]
    for grams_a, grams_b in [(a, b), (list(zip(a, a[1:])), list(zip(b, b[1:])))]:
        if grams_a or grams_b:
            scores.append(2 * (Counter(grams_a) & Counter(grams_b)).total() / (len(grams_a) + len(grams_b)))
    return sum(scores) / len(scores)


# ---------------------------------------------------------------- the toy world

# A small input for the real road: pictures of coloured shapes or letters, questions of every problem type with an exact
# answer, an oracle that knows whether thinking is sound, and a warm start with bad habits that GRPO can unlearn.
COLOURS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 80, 220), "yellow": (240, 200, 30)}
SIDES = {"circle": 90, "square": 4, "triangle": 3}
SHAPES, LETTERS = tuple(SIDES), ("C", "E", "H", "S", "T", "X")
GLYPHS = dict.fromkeys(PROBLEM_TYPES, SHAPES) | {"OCR": LETTERS}
CELLS = ("first", "second", "third", "fourth")  # row by row, two a row
PANELS = ("white", "#dcdcdc", "#ffe8d0", "#d8ecff")  # their backgrounds
SPANISH = {"red": "rojo", "green": "verde", "blue": "azul", "yellow": "amarillo", "is": "es"}
ENGLISH = {spanish: english for english, spanish in SPANISH.items()}
GUESSING = re.compile(r"\b(guess|usually|probably|perhaps|maybe|assum|no need to look)", re.I)
SOUND = 0.7  # thinking that scores less has a flaw of fact, of logic or of support, not of style alone
FLAWS = ("leap", "misread", "misread", "lucky", "language", "redundancy")  # "lucky": wrong thinking, correct answer
PROBLEMS = {"numerical": ("How many shapes are there?",), "OCR": ("Read the letters.",),
            "free-form": ("Describe the picture.", "What do you see?"),
            "multiple choice": ("Which colour is {}?", "Which shape is {}?")}
TEMPTING = ("What do you see?", "Which shape is fourth?")  # mostly answered in haste, as is what has much to count
SHOWN = dict.fromkeys(("train", "held-out"), {  # part: how many shapes or letters its scenes show
    "numerical": (1, 2, 3, 4), "multiple choice": (4,), "OCR": (4,), "free-form": (2,)}) | {
    "shifted": {"multiple choice": (4,), "OCR": (3,), "free-form": (3,)},  # it also asks for the cells in the middle
    "shortcut": {"numerical": (2,) * 19 + (1,)},  # who doesn't look says 2: right in 95 of 100 ..
    "broken": {"numerical": (3, 4)}}  # .. and never
TRAINED = ("train", "shortcut")  # a fifth of all scenes is kept for the other parts
TOY_SETS = {"toy": ("train", "held-out"), "toy-shifted": ("shifted", "shifted"), "toy-shortcut": ("shortcut", "broken")}


@dataclass(frozen=True)
class ToyQuestion:
    """A question about a scene, one to four (colour, glyph) pairs in the order of CELLS. Multiple choice asks for one
    attribute (0 colour, 1 shape) of one cell; `choices` are the values behind A, B, C, D."""
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
        a score: what the picture shows where something is claimed, "wrong" behind what was claimed otherwise, and a
        word for each other fault. What is named behind a cell is claimed of it: "first is a red circle"."""
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
        """The text in `faults`."""
        return self.faults(response)[1]

    def soundness(self, response):
        """The oracle: 1.0, 0.9 .. 0 for the thinking in `response`. An answer that doesn't follow, a wrong claim, a guess
        or missing evidence cost 0.4 each, wrong claims 0.6, a second language 0.2, a repetition 0.1, at most 0.3."""
        leap, wrong, unsupported, mixed, repeated = self.faults(response)[0].values()
        cost = 4 * leap + (0, 4, 6)[min(wrong, 2)] + 4 * unsupported + 2 * mixed + min(repeated, 3)
        return max(0, 10 - cost) / 10

    def habit(self, rng):
        """A bad habit, drawn as the warm start has them: "haste", one of FLAWS, or None for sound thinking."""
        tempting = len(self.scene) > 2 if self.problem_type == "numerical" else self.problem in TEMPTING
        if rng.random() < (0.8 if tempting else 0.2):
            return "haste"
        return rng.choice(FLAWS) if rng.random() < 0.4 else None

    def response(self, rng, flaw=None):
        """A response in the warm start's words: sound, or with the flaw."""
        scene, kind, glyphs = list(self.scene), self.problem_type, GLYPHS[self.problem_type]
        invented = [(rng.choice(list(COLOURS)), rng.choice(glyphs)) for _ in CELLS]
        guess = {"numerical": "2", "multiple choice": "D"}.get(kind) or self.answer(invented[:len(scene)])
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
            claims.append(f"{CELLS[self.cell]} is {scene[self.cell][self.attribute]}.")  # what the letter stands for
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
        if (zlib.crc32(repr(scene).encode()) % 5 > 0) == (part in TRAINED):
            questions.append(ToyQuestion(kind, PROBLEMS[kind][which].format(CELLS[cell]), scene, cell, which, choices))
    return tuple(questions)


def toy_question(id):
    """The ToyQuestion of a toy Example's id. Raises DataError for any other id."""
    named = re.fullmatch(rf"toy-({'|'.join(SHOWN)})-(.*)-(\d+)", id)
    if not named:
        raise DataError(f"{id}: is no question of the toy world, whose oracle knows no other")
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
# More words that a judge is asked with: known whole, they make its prompt short.
ASKED = ("Rate well answers below thought through. Write from 0 to 1, steps of 0.1, and nothing else. check each claim "
         "thinking, a few words. Then write \"score:\" wrong logical soundness: follows before correct reasoning facts "
         "methods right, shows them error identification flaw, guess, unsupported assumption language consistency "
         "throughout redundancy concise, said twice")


def toy_tokenizer():
    """A byte-level BPE tokenizer, like Qwen's, that knows the toy's words whole and any other text by its bytes."""
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
    """(model, Processor): an untrained Qwen2.5-VL of a million parameters, built from its config, and what turns an
    Example into its inputs. Its 28 x 28 pixel patches see one cell of a 56 x 56 toy picture each."""
    tokenizer = toy_tokenizer()
    pad, _, end, vision_start, vision_end, image, video = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)
    init = {"initializer_range": 0.08}  # 0.02, the default, is for wide models: this one would read nothing for long
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


# ---------------------------------------------------------------- what a step leaves

def about(example, step):
    """What a saved response says of its question."""
    return {"step": step, "id": example.id, "problem": example.problem, "problem_type": example.problem_type,
            "options": list(example.options), "solution": example.solution, "image": example.image}


def group_rows(step, examples, groups, gammas, lengths, **columns):
    """A dict a question, with its responses: for the log, the report and rollouts.jsonl. groups: texts [Q][G]; gammas
    [Q], 0 for a group without a score; lengths [N] in tokens; columns: [Q, G] each, NaN for none."""
    lengths = lengths.view(len(examples), -1).tolist()
    columns = {name: [[None if math.isnan(value) else value for value in group] for group in values.tolist()]
               for name, values in columns.items()}
    return [{**about(example, step), "gamma": gammas[q] or None, "responses": [
        {"response": text, **{name: values[q][i] for name, values in columns.items()}, "tokens": lengths[q][i]}
        for i, text in enumerate(groups[q])]} for q, example in enumerate(examples)]


def log_line(step, ranks, anneal, judged, times):
    """(the step's line for log.jsonl, the groups of all processes) from each process's (group_rows, metrics)."""
    groups = [group for rows, _ in ranks for group in rows]
    responses = [response for group in groups for response in group["responses"]]
    outcomes = [response["outcome"] for response in responses]
    scores = [response["thinking"] for response in responses if response["thinking"] is not None]
    gammas = [group["gamma"] for group in groups if group["gamma"] is not None]
    rollout, score, update = (end - start for start, end in zip(times, times[1:]))
    metrics = {name: fmean(metrics[name] for _, metrics in ranks) for name in ranks[0][1]}
    return {
        "step": step, "outcome": fmean(outcomes), "thinking": fmean(scores) if scores else None,
        "gamma": fmean(gammas) if gammas else None, "anneal": anneal,
        "reward_std": fmean(stdev(response["reward"] for response in group["responses"]) for group in groups),
        **metrics, "length": fmean(response["tokens"] for response in responses),
        "accuracy": fmean(outcome >= 0.5 for outcome in outcomes),
        "truncated": sum(metrics["truncated"] for _, metrics in ranks),
        "unscored": (len(groups) - len(gammas)) * judged,
        "zero_groups": sum(not any(r["advantage"] for r in group["responses"]) for group in groups),
        "mistrusted": sum(gamma < 1 for gamma in gammas), "sec_rollout": rollout, "sec_score": score,
        "sec_update": update,
        "tokens_per_sec": sum(response["tokens"] for response in responses) / (rollout + score + update)}, groups


def write_step(out, line, groups, config):
    """What a step leaves: its line in the log, some groups for the report and, if wanted, every response."""
    append_line(out / "log.jsonl", json.dumps(line, allow_nan=False))
    if config.save_rollouts:
        write_rollouts(out, ({**{name: value for name, value in group.items() if name != "responses"}, **response}
                             for group in groups for response in group["responses"]))
    if line["step"] in (1, config.steps // 2, config.steps):
        for group in sorted(groups, key=lambda group: group["gamma"] or 1)[:4]:  # the least trusted ones
            append_line(out / "groups.jsonl", json.dumps({**group, "thumbnail": thumbnail(group["image"])}))


class Watch:
    """Says once each what a run's numbers would only say to those who look; called with each step's line and groups."""

    def __init__(self, judged):
        self.scored, self.formless, self.judged = [], 0, judged

    def __call__(self, line, groups):
        self.scored = [*self.scored, *(group["gamma"] is not None for group in groups)][-50:]
        missing = self.scored.count(False)
        if self.judged and missing > 25:
            self.judged = False
            tqdm.write(f"WARNING: the reward model gave no usable score for {missing} of the last {len(self.scored)} "
                       "groups: they learn from the outcome alone. Try --rm_mode expected, or another --reward_model.",
                       file=sys.stderr)
        self.formless += 1 if not line["format_rate"] else -self.formless
        if self.formless == 10 and line["step"] == 10:
            first = groups[0]["responses"][0]["response"][:300]
            tqdm.write("WARNING: no response of the first 10 steps is in the format <think>..</think>"
                       f"<answer>..</answer>, so none earns anything. The first of this step: {first!r}",
                       file=sys.stderr)


def write_rollouts(out, rows):
    """Responses, for reward_model.py to learn from."""
    append_line(Path(out) / "rollouts.jsonl", "\n".join(map(json.dumps, rows)))


# ---------------------------------------------------------------- files that survive a crash


def _beside(path):
    """A name next to `path` for what will take its place (across disks a rename would be a copy), its own for each
    process. What processes that were killed have left under such names is removed."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.new"):
        try:
            os.kill(int(leftover.suffixes[-2][1:]), 0)  # signal 0 only asks whether the process lives
        except ProcessLookupError:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        except (ValueError, OverflowError, PermissionError):  # no name of ours; another user's process
            pass
    return path.with_name(f".{path.name}.{os.getpid()}.new")


def write_atomic(path, content):
    """Write a file so that a crash leaves the old one or the new one, never half. content: bytes, text (as UTF-8), or
    what writes into the open file. Raises OSError."""
    path = Path(path)
    if RANK > 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = _beside(path)
    try:
        with open(new, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the rename itself
    os.close(folder)


def write_json(path, value):
    """A value as readable JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=1) + "\n")


def append_line(path, text):
    """Append one line; it is on the disk when this returns. A half line left by a crash is closed first."""
    if RANK > 0:
        return
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            text = text if file.read() == b"\n" else "\n" + text
        file.write(text.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path):
    """The objects of a JSON lines file, none if there is no file. A line torn by a crash is passed over."""
    lines = []
    for line in Path(path).read_bytes().split(b"\n") if Path(path).exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:  # no JSON, or half a character of UTF-8
            continue
    return lines


def cut_log(out, step):
    """Cut what a run left down to the steps up to `step`: those after it come again, with what was last."""
    for path in (Path(out, name) for name in ("log.jsonl", "groups.jsonl", "rollouts.jsonl")):
        kept = [line for line in read_lines(path) if line["step"] <= step and not (line["step"] and "held_out" in line)]
        if path.exists():
            write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))


def save_folder(folder, model, processor, weights=None):
    """Model and processor in Hugging Face format, with SHA256SUMS, written beside the old folder and then put in its
    place. weights: the state dict to write (default: the model's own). If another process saves the same folder at the
    same time, one of the two is there in the end, whole. Raises OSError."""
    if RANK > 0:
        return
    folder = Path(folder)
    beside = _beside(folder)
    shutil.rmtree(beside, ignore_errors=True)  # of a save that failed
    new = beside / "new"
    model.save_pretrained(new, state_dict=weights)
    processor.save_pretrained(new)
    write_atomic(new / "SHA256SUMS", "".join(f"{_sha256(file)}  {file.name}\n" for file in sorted(new.iterdir())))
    with suppress(FileNotFoundError):  # there is none yet
        os.replace(folder, beside / "old")
    try:
        os.replace(new, folder)
    except OSError:  # another process has put its own there in between?
        if not folder.exists():
            raise
    shutil.rmtree(beside)


def check_folder(folder):
    """OSError if files of a model folder differ from its SHA256SUMS; what else stands in there is passed over."""
    sums = Path(folder, "SHA256SUMS")
    named = re.findall(r"(?m)^([0-9a-f]{64}) [ *](\S.*)$", sums.read_text() if sums.exists() else "")
    files = {sums.with_name(name): digest for digest, name in named}
    if damaged := [file.name for file, digest in files.items() if not file.exists() or _sha256(file) != digest]:
        raise OSError(f"{', '.join(damaged)} changed since it was saved (SHA256SUMS); restore it from a copy.")


@contextmanager
def lock(folder):
    """A lock on a run's folder, made if need be, so that one process alone writes there; it ends with the process,
    however that ends. Raises DataError if another one holds it, or if the folder can't be written."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = open(Path(folder, f".lock{RANK or ''}"), "w")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(f"--out {folder}: another run is writing there; choose another") from error
    except OSError as error:
        raise DataError(f"--out {folder}: can't be written: {error}") from error
    with file:
        yield


def read_checkpoint(path):
    """A saved state. A damaged file ends the run in one line: torch reads flipped bits in silence, but its zip format
    carries a checksum of each part."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"wrong checksum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, OSError, ValueError, EOFError, RuntimeError) as error:
        raise SystemExit(f"{path} is damaged and wasn't loaded: {str(error).splitlines()[0]}. Restore it from a copy, "
                         "or start the run again.") from error


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- what a run shows: table, curves, report


def paired_difference(before, after):
    """The change a question in words, with its 95% interval (normal, paired), for 0/1 results on the same questions."""
    changes = np.subtract(after, before)
    if len(changes) < 30:
        return f"{changes.mean():+.3f}, too few questions for an interval"
    half = 1.96 * changes.std(ddof=1) / math.sqrt(len(changes))
    return f"{changes.mean():+.3f}, 95% interval {changes.mean() - half:+.3f} to {changes.mean() + half:+.3f}"


def table(results):
    """Evaluations side by side as text; `results` maps a column's name to what `evaluate` returned."""
    columns, last = list(results.values()), list(results.values())[-1]
    rows = [("right answers", [c["accuracy"] for c in columns], f"of {last['n']}")]
    rows += [(f"  {kind}", [c["by_type"][kind]["accuracy"] for c in columns], f"of {part['n']}")
             for kind, part in last["by_type"].items()]
    rows.append(("in the right format", [c["format_rate"] for c in columns], ""))
    if "soundness" in last:
        rows.append(("sound thinking, of right answers", [c["soundness"] for c in columns], ""))
    lines = [" " * 34 + "".join(f"{name:>10}" for name in results)]
    for name, values, note in rows:
        cells = [f"{'-' if value is None else format(value, '.3f'):>10}" for value in values]
        lines.append(f"{name:<34}{''.join(cells)}  {note}".rstrip())
    if len(columns) == 2:
        lines.append(f"change in right answers: {paired_difference(columns[0]['right'], last['right'])}")
    return "\n".join(lines)


def plot(panels):
    """PNG bytes, a panel for each function of a matplotlib axis, three a row. Without matplotlib raises ImportError."""
    from matplotlib.figure import Figure  # here: only pictures need it, and it takes a second to import
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(12 if columns > 1 else 7, 2.5 * rows + 2 * (rows == 1)), layout="constrained")
    for i, panel in enumerate(panels, 1):
        panel(figure.add_subplot(rows, columns, i))
    png = io.BytesIO()
    figure.savefig(png, dpi=80)
    return png.getvalue()


def thumbnail(path):
    """A picture in small, as base64 of a PNG, so that the report needs nothing but the run's folder. None for None."""
    if path is None:
        return None
    file, picture = io.BytesIO(), open_picture(path)
    picture.thumbnail((320, 320))
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


CURVES = (("accuracy", "share of right answers"), ("outcome", "outcome reward R^o"),
          ("thinking", "thinking reward R^t"), ("gamma", "trust gamma"), ("anneal", "annealing exp(-step/T)"),
          ("kl", "KL to the reference"), ("length", "response length, tokens"), ("grad_norm", "gradient norm"),
          ("format_rate", "share in the format"))
PAGE = """<!doctype html><meta charset="utf-8"><title>sophia_min</title><style>
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1100px;margin:2em auto;padding:0 1em}img{max-width:100%}
pre,section{background:#fafafa;border:1px solid #ddd;border-radius:.5em;padding:.8em 1em;overflow-x:auto}
section{margin:1.2em 0}section>img{min-width:112px;image-rendering:pixelated}h2{margin-top:1.8em}h3{margin:0 0 .5em}
table{border-collapse:collapse;width:100%}td,th{padding:.3em .7em;text-align:left;vertical-align:top}
th{font-weight:normal;color:#666}tr+tr{border-top:2px solid #fafafa}td+td{text-align:right;white-space:nowrap}
.right{background:#dff2df}.wrong{background:#eee;color:#555}.lucky{background:#ffd98a}.praised{background:#f7c4c4}
.mistrusted{background:#b3261e;color:#fff}span{padding:.1em .5em;border-radius:.3em}</style>"""
LEGEND = """<p><span class=right>right, thinking scored 0.5 or more</span> <span class=lucky>right, but thinking scored
below: "wrong thinking, correct answer"</span> <span class=wrong>wrong</span> <span class=praised>wrong, but thinking
scored 0.5 or more</span> <span class=mistrusted>gamma below 1: wrong answers got the better thinking scores</span>
<p>R^o: outcome reward, R^t: thinking reward, R: both combined (Eq. 5), A: advantage (Eq. 6). Of each step shown, the
four groups with the lowest gamma."""


def write_report(out):
    """report.html from what a run left in `out`: one self-contained page with its evaluation, curves and some groups.
    Without matplotlib it says what is missing in the place of the curves."""
    if RANK > 0:
        return
    out, log = Path(out), read_lines(Path(out) / "log.jsonl")
    settings, evaluation = (json.loads((out / name).read_text()) for name in ("config.json", "eval.json"))

    def curve(name, title, axis):
        points = [(line["step"], line[name]) for line in log if line[name] is not None]
        axis.plot(*zip(*points) if points else ([], []))
        axis.set_title(title, fontsize=10)

    try:
        curves = _inline(base64.b64encode(plot([functools.partial(curve, *named) for named in CURVES])).decode())
    except ImportError as error:
        curves = f"<p>No curves, as matplotlib can't be imported ({escape(str(error))}): pip install matplotlib"
    chosen = ", ".join(f"{name} {settings[name]}" for name in "model reward_model trust alpha steps seed".split())
    parts = [PAGE, f"<h1>sophia_min: {escape(out.name)}</h1><p>{escape(chosen)}", "<h2>Held-out questions</h2><pre>",
             escape(table(evaluation)), "</pre><h2>Training, by step</h2>", curves, "<h2>Some groups</h2>", LEGEND]
    for group in read_lines(out / "groups.jsonl"):
        asked, gamma = escape(" ".join([group["problem"], *group["options"]])), group["gamma"]
        trust = "not scored" if gamma is None else f"gamma {gamma:.2f}"
        trust = f"<span class=mistrusted>{trust}</span>" if gamma is not None and gamma < 1 else trust
        parts += [f"<section><h3>step {group['step']}: {asked} (truth: {escape(group['solution'])}) {trust}</h3>",
                  _inline(group["thumbnail"]), "<table><tr><th>response<th>R^o<th>R^t<th>R<th>A"]
        for response in group["responses"]:
            right, thinking = response["outcome"] >= 0.5, response["thinking"]
            praised = right if thinking is None else thinking >= 0.5
            kind = {(1, 1): "right", (1, 0): "lucky", (0, 1): "praised", (0, 0): "wrong"}[right, praised]
            cells = [escape(response["response"]), f"{response['outcome']:.2f}", "-" if thinking is None else
                     f"{thinking:.2f}", f"{response['reward']:.2f}", f"{response['advantage']:+.2f}"]
            parts.append(f"<tr class={kind}><td>" + "<td>".join(cells))
        parts.append("</table></section>")
    write_atomic(out / "report.html", "\n".join(parts))


def _inline(png):
    return f"<img src='data:image/png;base64,{png}'>" if png else ""
