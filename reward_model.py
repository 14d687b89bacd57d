"""The thinking reward model (paper, section 3.2): a Qwen2.5-VL that reads picture, question and response and writes one
number, R^t. Before it, what all of sophia_min uses: the shared prompt, loading, AdamW, supervised fine-tuning; behind
it, the commands that make and measure one from the responses of a run."""
import argparse
import copy
import difflib
import importlib.util
import inspect
import json
import math
import random
import re
import zlib
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map
from transformers import DynamicCache, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import data
from data import progress

# ---------------------------------------------------------------- one prompt, many continuations

# what transformers calls the keys and values: `cache` from 5.24 on, where the older name draws a notice
CACHE = "cache" if "cache" in inspect.signature(Qwen2_5_VLForConditionalGeneration.forward).parameters else (
    "past_key_values")


def pad(rows, side, value=0):
    """Lists of token ids as one tensor [N, L], padded left or right, and its mask (1 where a token is)."""
    ids, how = [torch.tensor(row, dtype=torch.long) for row in rows], dict(batch_first=True, padding_side=side)
    mask = [torch.ones_like(row) for row in ids]
    return pad_sequence(ids, padding_value=value, **how), pad_sequence(mask, **how)


class SharedPrompt:
    """A group's prompt, computed once: picture and text pass through the model a single time, and all continuations
    (responses to sample or to train on, thinking to judge) start from copies of its keys and values.

    This is exact, not an approximation: causal attention never lets a prompt see what follows it. Positions are always
    given explicitly, since Qwen2.5-VL otherwise takes them from state left on the model by an earlier call, or counts
    them in one dimension, in silence. B prompts are padded on the left; `owner` says whose continuation a row is."""

    def __init__(self, model, prompts):
        device, config = model.device, model.config
        if is_sharded(model) and all(prompt.pixel_values is None for prompt in prompts):
            prompts = [*prompts, blank_picture(config)]  # ranks must pass through the vision tower equally often
        ids, mask = pad([prompt.ids for prompt in prompts], "left", config.text_config.pad_token_id or 0)  # [B, P]
        self.ids, self.mask = ids.to(device), mask.to(device)
        seen = [prompt for prompt in prompts if prompt.pixel_values is not None]
        pixels = torch.cat([prompt.pixel_values for prompt in seen]).to(device, model.dtype) if seen else None
        grid = torch.cat([prompt.grid for prompt in seen]).to(device) if seen else None
        is_image = ((self.ids == config.image_token_id) & (self.mask == 1)).int()
        self.positions, delta = model.model.get_rope_index(  # [3, B, P], [B, 1]
            self.ids, mm_token_type_ids=is_image, image_grid_thw=grid, attention_mask=self.mask)
        self.next_position = self.mask.sum(-1) + delta.squeeze(-1)  # [B]
        output = model(input_ids=self.ids, attention_mask=self.mask, position_ids=self.positions, pixel_values=pixels,
                       image_grid_thw=grid, use_cache=True, logits_to_keep=1)
        if getattr(output, CACHE) is None:
            raise RuntimeError("the model dropped its cache: switch gradient checkpointing off, it works against it")
        self.keys_values = [(layer.keys, layer.values) for layer in getattr(output, CACHE).layers]
        self.end = [output.logits] if is_sharded(model) else []  # each of keys and values: [B, heads, P, dim]

    def cut(self):
        """Make keys and values leaves: backward passes through continuations add their gradients up there, and
        `backward` carries the sum through the prompt once."""
        self.computed = [tensor for pair in self.keys_values for tensor in pair]
        self.leaves = [tensor.detach().requires_grad_() for tensor in self.computed]
        self.keys_values = list(zip(self.leaves[::2], self.leaves[1::2]))
        return self

    def backward(self):
        """The second half of the backward pass: from the keys and values into the prompt. FSDP gathers a layer's
        weights when the backward pass reaches its output, so there it starts, with zeros, from the model's end."""
        torch.autograd.backward(self.computed + self.end, [
            leaf.grad for leaf in self.leaves] + [torch.zeros_like(end) for end in self.end])

    def continued(self, owner, ids, mask):
        """The model's arguments for rows [N, T] of which row n continues prompt owner[n]."""
        ids, mask, cache = ids.to(self.ids), mask.to(self.mask), DynamicCache()
        for layer, (keys, values) in enumerate(self.keys_values):
            cache.update(keys[owner], values[owner], layer)
        positions = self.next_position[owner, None] + (mask.cumsum(-1) - 1).clamp(min=0)  # [N, T], all text
        return dict(input_ids=ids, attention_mask=torch.cat([self.mask[owner], mask], 1),
                    position_ids=positions.expand(3, -1, -1), use_cache=True, **{CACHE: cache})

    def extended(self, model, owner, tails):
        """The same for longer prompts: row n is prompt owner[n] and tails[n], computed once for all that follows."""
        longer, (ids, mask) = copy.copy(self), pad(tails, "left")
        inputs = self.continued(owner, ids, mask)
        cache = getattr(model(**inputs, logits_to_keep=1), CACHE)
        longer.mask = inputs["attention_mask"]
        longer.keys_values = [(layer.keys, layer.values) for layer in cache.layers]
        longer.next_position = self.next_position[owner] + mask.sum(-1).to(self.ids)
        return longer


def target_logits(model, shared, owner, tails, targets):
    """logits [N, R, V] that predict targets [N, R]: row n reads prompt owner[n], tails[n] and its target so far."""
    tail_ids, tail_mask = pad(tails, "left")
    target_ids, target_mask = pad(targets, "right")
    ids, mask = torch.cat([tail_ids, target_ids], 1)[:, :-1], torch.cat([tail_mask, target_mask], 1)[:, :-1]
    return model(**shared.continued(owner, ids, mask), logits_to_keep=target_ids.shape[1]).logits


@torch.no_grad()
def generate(model, shared, owner, tails, max_new_tokens, temperature=None, scores=False, **limits):
    """New token ids [N, R], sampled at `temperature` or greedily; with `scores` also the logits [N, R, V] and what the
    sampling filters made of them. Every filter is given explicitly: HF fills the gaps from the checkpoint's settings.
    """
    ids, mask = pad(tails, "left")
    inputs = shared.continued(owner, ids, mask)
    inputs["input_ids"] = torch.cat([shared.ids[owner], inputs["input_ids"]], 1)  # generate wants the whole sequence
    inputs["position_ids"] = torch.cat([shared.positions[:, owner], inputs["position_ids"]], 2)
    sampling, eos = dict(do_sample=False), end_ids(model)
    if temperature:
        sampling = dict(do_sample=True, temperature=temperature, top_p=1.0, top_k=0)
    out = model.generate(**inputs, **sampling, repetition_penalty=1.0, min_p=None, num_beams=1, eos_token_id=eos,
                         pad_token_id=eos[0], max_new_tokens=max_new_tokens, return_dict_in_generate=True,
                         output_scores=scores, output_logits=scores, synced_gpus=is_sharded(model), **limits)
    new = out.sequences[:, inputs["input_ids"].shape[1]:]
    return (new, torch.stack(out.logits, 1), torch.stack(out.scores, 1)) if scores else new


def end_ids(model):
    """Ids that end a response."""
    eos = model.generation_config.eos_token_id
    return eos if isinstance(eos, list) else [eos]


def blank_picture(config):
    """The Prompt of a picture of one token, for nobody to continue."""
    vision = config.vision_config
    side, values = vision.spatial_merge_size, vision.in_channels * vision.temporal_patch_size * vision.patch_size ** 2
    return data.Prompt([config.vision_start_token_id, config.image_token_id, config.vision_end_token_id], [],
                       torch.zeros(side * side, values), torch.tensor([[1, side, side]]))


def is_sharded(model):
    """Whether the model is spread over ranks, which must then pass through it equally often."""
    return isinstance(next(model.parameters()), DTensor)


def named_weights(model):
    """The model's parameters by name. After a forward pass FSDP leaves those of the root in one piece, as other
    tensors: first back into the parts that a rank owns."""
    if is_sharded(model):
        model.reshard()
    return dict(model.named_parameters())


# ---------------------------------------------------------------- models, precision, supervised fine-tuning

SHORT_IDS = {f"Qwen/Qwen2.5-VL-{size}": f"Qwen/Qwen2.5-VL-{size}-Instruct" for size in ("3B", "7B", "32B", "72B")}


def place(device="auto", attention="auto"):
    """(device, dtype, attention) to compute with: bf16 and, where it can be imported, flash-attn on CUDA."""
    device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    flash = device.startswith("cuda") and importlib.util.find_spec("flash_attn")
    attention = attention if attention != "auto" else "flash_attention_2" if flash else "sdpa"
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward gives NaN for some masks: pytorch issue 196678
    return device, torch.bfloat16 if device.startswith("cuda") else torch.float32, attention


@contextmanager
def one_line(name):
    """Ends the run in one line where a model can't be had."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"{name} can't be loaded: {str(error).strip().splitlines()[0]} Is it a Qwen2.5-VL id or "
                         "folder, and is there a network or a cached copy?") from error


def load_config(name):
    """The configuration of a Hugging Face id or folder."""
    name = SHORT_IDS.get(name, name)
    with one_line(name):
        return Qwen2_5_VLConfig.from_pretrained(name)


def load(name, device="auto", attention="auto", max_pixels=None):
    """(model, Processor) of a Hugging Face id or folder; ends in one line where that isn't possible."""
    name, (device, dtype, attention) = SHORT_IDS.get(str(name), str(name)), place(device, attention)
    if damaged := data.damaged_files(name):
        raise SystemExit(f"{name} is damaged: {', '.join(damaged)} changed since it was saved (SHA256SUMS)")
    with one_line(name):
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(name, dtype=dtype, attn_implementation=attention)
        processor = data.Processor.from_pretrained(name, max_pixels)
    return model.to(device).eval(), processor


class Optimizer:
    """AdamW on fp32 master weights. A bf16 model computes; at lr 5e-7 its own weights would swallow the steps, since
    bf16 keeps three digits. Gradients of a bf16 model are added up in fp32, too.

    `park`: masters and moments, 12 bytes a weight, stay in host memory, and AdamW runs there: what a card holds then
    is the bf16 policy and the sum of its gradients, 6 bytes a weight instead of 18."""

    def __init__(self, model, lr, betas=(0.9, 0.999), park=False):
        self.weights = [weight for weight in named_weights(model).values() if weight.requires_grad]
        self.apart = park or self.weights[0].dtype == torch.bfloat16
        self.masters = self.weights if not self.apart else [
            torch.nn.Parameter(weight.detach().to("cpu" if park else weight.device, torch.float32, copy=True))
            for weight in self.weights]
        self.sums = {}  # where masters are apart: fp32 gradients by weight
        self.hooks = [weight.register_post_accumulate_grad_hook(self._collect)
                      for weight in self.weights if self.apart]
        self.adamw = torch.optim.AdamW(self.masters, lr=lr, betas=betas, weight_decay=0.01,  # released config
                                       fused=park or None)

    def _collect(self, weight):
        self.sums[weight] = self.sums[weight].add_(weight.grad) if weight in self.sums else weight.grad.float()
        weight.grad = None

    def close(self):
        """Let go of the model, for another Optimizer."""
        for hook in self.hooks:
            hook.remove()

    def gradients(self):
        """The gradient of each weight so far, None where nothing reached it."""
        return [self.sums.get(weight) if self.apart else weight.grad for weight in self.weights]

    def step(self, max_norm=4.0):  # released config
        """Clip, move the masters, copy them into the model. Returns the gradient's norm; raises before anything moves
        if it isn't finite."""
        gradients = self.gradients()
        norm = data.whole(torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None]))
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm.item()}; no weight was moved")
        scale = (max_norm / (norm + 1e-6)).clamp(max=1).item()
        for master, gradient in zip(self.masters, gradients):
            master.grad = None if gradient is None else gradient.mul_(scale).to(master.device)
        self.adamw.step()
        self.adamw.zero_grad()
        self.sums.clear()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters) if self.apart else ():
                weight.copy_(master)
        return norm.item()

    def state(self, model):
        """All that a resumed run needs of the model and of AdamW, in fp32 and in one piece: the same from one process
        and from several. Rank 0 alone gets it."""
        masters = dict(zip(self.weights, self.masters))
        return {"weights": {name: data.gathered(masters.get(weight, weight).detach())
                            for name, weight in named_weights(model).items()},
                "adamw": tree_map(lambda value: data.gathered(value) if isinstance(value, torch.Tensor) else value,
                                  self.adamw.state_dict())}

    @torch.no_grad()
    def restore(self, model, saved):
        """Put a saved state back, however many processes it came from."""
        def spread(tensor, like):
            if not isinstance(like, DTensor) or tensor.shape != like.shape:
                return tensor
            return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)

        masters = dict(zip(self.weights, self.masters))
        for name, weight in named_weights(model).items():
            masters.get(weight, weight).copy_(spread(saved["weights"][name], weight))
            weight.copy_(masters.get(weight, weight))
        moments = {i: {name: spread(value, self.masters[i]) for name, value in parts.items()}
                   for i, parts in saved["adamw"]["state"].items()}
        self.adamw.load_state_dict({**saved["adamw"], "state": moments})


def sft(model, items, encode, steps, per_step, lr, desc, seed=0, at_once=0):
    """Supervised fine-tuning: cross-entropy on the target tokens only. encode(item) gives (Prompt, tails, targets), all
    rows of one prompt, which is computed once; `at_once` items a backward pass (0: all). Linear warm-up and decay.
    Changes `model` in place."""
    optimizer = Optimizer(model, lr, betas=(0.9, 0.95), park=model.device.type == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.adamw, lambda i: min((i + 1) / 30, 1) * (1 - i / steps))
    rng, queue = random.Random(seed), []
    bar = progress(range(steps), desc=desc)
    for _ in bar:
        if len(queue) < per_step:
            queue = rng.sample(items, len(items))
        batch = [encode(queue.pop()) for _ in range(min(per_step, len(items)))]
        n_tokens, total = sum(len(target) for _, _, targets in batch for target in targets), 0.0
        for first in range(0, len(batch), at_once or per_step):
            part = batch[first:first + (at_once or per_step)]
            owner = torch.tensor([b for b, (_, tails, _) in enumerate(part) for _ in tails])
            tails, targets = ([row for entry in part for row in entry[which]] for which in (1, 2))
            shared = SharedPrompt(model, [prompt for prompt, _, _ in part])
            labels, mask = pad(targets, "right")
            logits = target_logits(model, shared, owner, tails, targets)[mask.to(model.device) == 1].float()
            loss = F.cross_entropy(logits, labels[mask == 1].to(logits.device), reduction="sum") / n_tokens
            loss.backward()
            total += loss.item()
        optimizer.step(max_norm=1.0)
        schedule.step()
        bar.set_postfix(loss=f"{total:.3f}")
    optimizer.close()


# ---------------------------------------------------------------- the judge

ASK = "Rate it."
JUDGE_PROMPT = "Rate how well the answers below are thought through. " + " ".join(
    f"{name}: {meaning}." for name, meaning in data.CRITERIA.items())
DELIMITER = "score:"
JUST_THE_SCORE = " Write one number from 0 to 1, in steps of 0.1, and nothing else."
JUDGE_FORMS = {"generate": JUST_THE_SCORE, "expected": JUST_THE_SCORE, "reason": (
    f' First check each claim in the thinking, in a few words. Then write "{DELIMITER}" and one number from 0 to 1, in '
    "steps of 0.1.")}
LONGEST_VERDICT = {"generate": 8, "reason": 128}  # tokens
SPELLINGS = {**{f"{n / 10:.1f}": n / 10 for n in range(11)}, "0": 0.0, "1": 1.0}  # what `expected` takes the mean of


def read_template(path):
    """The judge's prompt in a file: text with {question}, {response} and, where the picture is to stand, {image}. With
    the picture behind the response, as the released reward model was trained, each response has a pass of its own."""
    text = Path(path).read_text()
    if any(text.count(name) != 1 for name in ("{question}", "{response}", "{image}")):
        raise SystemExit(f"{path}: must hold {{question}}, {{response}} and {{image}}, each once")
    return text


def parse_score(text):
    """The judge's score: the whole text must be one plain number in [0, 1], else None ("no score", which is not 0)."""
    number = re.fullmatch(r"\s*([01](\.[0-9]{1,6})?|\.[0-9]{1,6})\s*", text, re.ASCII)
    return float(number[1]) if number and float(number[1]) <= 1 else None


class ThinkingRewardModel:
    """A frozen Qwen2.5-VL that reads picture, question and response and gives one number in [0, 1], R^t. By `mode`:
    generate: it writes the number (the paper's way).
    expected: the mean of the eleven scores under its own probabilities, to 0.1; one more pass, never without a score.
    reason:   it checks the claims in writing and then writes the number, for the price of generating that: the limit
              that the paper's authors name is that theirs can't.
    A folder that `train` made remembers its mode. `template`: a file with a prompt of the user's own."""

    def __init__(self, model, processor, mode=None, template=None):
        self.model, self.processor = model.eval().requires_grad_(False), processor
        self.mode = mode or getattr(model.config, "rm_mode", "generate")
        self.template = read_template(template) if template else None

    def prompt(self, example):
        """What a group's responses share: instruction, picture and question, up to where a response begins. A response
        stands in a turn of its own, whose ends are special tokens that no text can spell: whatever it says is data."""
        return self.processor.chat(data.question_text(example), example.image, JUDGE_PROMPT + JUDGE_FORMS[self.mode],
                                   then=ASK)

    @torch.no_grad()
    def score(self, examples, groups):
        """R^t [Q, G] of the responses groups[q][i] to examples[q]; NaN where the judge wrote no usable score."""
        prompts, owner, tails = [], [], []
        for example, responses in zip(examples, groups):
            if self.template:
                read = [self.processor.filled(self.template, example.image, data.question_text(example), response)
                        for response in responses]
            else:
                prompt = self.prompt(example)
                read = [replace(prompt, tail=self.processor.encode(text) + prompt.tail) for text in responses]
            for n, prompt in enumerate(read):
                if n == 0 or prompt.ids != prompts[-1].ids:  # equal: shared
                    prompts.append(prompt)
                owner.append(len(prompts) - 1)
                tails.append(prompt.tail)
        shared, owner = SharedPrompt(self.model, prompts), torch.tensor(owner)
        if self.mode == "expected":  # to 0.1: Eq. 6 would blow noise of 0.001 up in a group that is all right
            scores = [round(score, 1) for score in self.expected(shared, owner, tails)]
        else:
            scores = self.written(shared, owner, tails)
        return torch.tensor(scores).view(len(examples), -1)

    def written(self, shared, owner, tails):
        """The score that the judge writes behind each row's tail; NaN for none."""
        new = generate(self.model, shared, owner, tails, LONGEST_VERDICT[self.mode])
        ends = torch.tensor(end_ids(self.model), device=new.device)
        ended = torch.isin(new, ends).any(1)  # cut at the limit, "0" may begin "0.5"
        texts = [self.processor.decode(row) if whole else "" for row, whole in zip(new, ended)]
        if self.mode == "reason":
            texts = [score if found else "" for _, found, score in (t.lower().rpartition(DELIMITER) for t in texts)]
        return [math.nan if score is None else score for score in map(parse_score, texts)]

    def expected(self, shared, owner, tails):
        """The mean of the scores that it might write there, by their probabilities to the end of the turn."""
        written = [self.processor.encode(text) + end_ids(self.model)[:1] for text in SPELLINGS]
        labels, mask = pad(written, "right")  # [13, T]; with the end, since "0" begins "0.1"
        values, scores = torch.tensor(list(SPELLINGS.values()), dtype=torch.float64), []
        for n in range(len(tails)):  # one response at a time: its keys and values are copied 13 times
            longer = shared.extended(self.model, owner[n:n + 1], [tails[n][:-1]])
            logits = target_logits(self.model, longer, torch.zeros(len(written), dtype=torch.long),
                                   [tails[n][-1:]] * len(written), written)  # [13, T, V]
            logp = logits.double().log_softmax(-1).cpu().gather(-1, labels.unsqueeze(-1)).squeeze(-1)  # [13, T]
            scores.append((values * (logp * mask).sum(-1).softmax(0)).sum().item())
        return scores


# ---------------------------------------------------------------- building its training set (section 3.2)


def interval(score):
    """0 for [0, 0.1) .. 9 for [0.9, 1), 10 for 1.0. By rounding: int(0.3 / 0.1) is 2."""
    return int(round(score * 10, 6))


def filter_rows(rows, longest=4000):
    """The rows that are fit to learn from: thinking that ends and has words, not too long (in characters), each
    (question, response) once."""
    kept = {}
    for row in rows:
        thinking, end, _ = row["response"].partition("</think>")
        if end and re.search(r"\w", thinking.replace("<think>", "")) and len(row["response"]) <= longest:
            kept.setdefault((row["id"], row["response"]), row)
    return list(kept.values())


def balance_by_score(rows, per_interval, seed=0):
    """At most `per_interval` rows of each score interval, drawn without replacement; the same for the same seed."""
    rng, by_interval = random.Random(seed), {}
    for row in rows:
        by_interval.setdefault(interval(row["score"]), []).append(row)
    return [row for _, group in sorted(by_interval.items())
            for row in (rng.sample(group, per_interval) if len(group) > per_interval else group)]


def shuffled(rows, seed=0):
    """The same rows with the labels of others: who learns from them writes scores that mean nothing (Table 3)."""
    others = random.Random(seed).sample(rows, len(rows))
    return [{**row, "score": other["score"], "critique": other.get("critique")} for row, other in zip(rows, others)]


def misled(rows):
    """The same rows with labels that praise a flaw, for the study: 1.0 for thinking that guesses, else half of it."""
    guesses = [data.GUESSING.search(row["response"].partition("</think>")[0]) for row in rows]
    return [{**row, "score": 1.0 if guess else round(row["score"] / 2, 1)} for row, guess in zip(rows, guesses)]


def train(model, processor, rows, steps, per_step, lr, mode="generate", seed=0, desc="reward model", at_once=0):
    """SFT of a judge, in place, on rows {"example", "response", "score", and for mode "reason" "critique"}: loss on
    what it is to write only. Returns the ThinkingRewardModel."""
    judge = ThinkingRewardModel(model, processor, mode)

    def encode(group):
        prompt = judge.prompt(group[0]["example"])
        verdicts = [f"{row['critique']} {DELIMITER} {row['score']:.1f}" if mode == "reason" else f"{row['score']:.1f}"
                    for row in group]
        return prompt, [processor.encode(row["response"]) + prompt.tail for row in group], [
            processor.encode(verdict) + [processor.tokenizer.eos_token_id] for verdict in verdicts]

    model.config.rm_mode = mode
    model.requires_grad_(True)
    sft(model, by_question(rows), encode, steps, per_step, lr, desc, seed, at_once)
    return ThinkingRewardModel(model, processor, mode)


def warm_start(model, processor, seed, folder):
    """What the toy world starts from: `model`, untrained, learns in place to read the pictures, to answer in the format
    and to check what others claim, and then to answer in haste or with flawed thinking much of the time. Returns a
    copy from before the bad habits, from which a judge starts."""
    eos, items = [processor.tokenizer.eos_token_id], data.toy_warm_start(3000, seed, folder)

    def look(item):  # write the sound response, or check a flawed one: two rows of one prompt
        example, sound, flawed, _ = item
        prompt = processor.chat(data.question_text(example), example.image, data.SYSTEM_PROMPT, then=ASK)
        first = prompt.ids.pop()
        return prompt, [[first], [first] + processor.encode(flawed) + prompt.tail], [
            processor.encode(text) + eos for text in (sound, example.critique(flawed))]

    def relapse(item):
        prompt = processor.question(item[0])
        return prompt, [prompt.tail] * 2, [processor.encode(text) + eos for text in item[3]]

    sft(model, items, look, 700, 12, 2e-3, "warm start 1/2: SFT on sound responses, and on checking others", seed)
    attentive = copy.deepcopy(model)
    sft(model, items, relapse, 120, 16, 1.5e-3, "warm start 2/2: SFT on half of them hasty or flawed", seed)
    return attentive


# ---------------------------------------------------------------- the command line: from a run's responses to a judge


def read_rows(path, *needed):
    """The rows of a JSON lines file, each with the fields `needed`. Ends in one line that names file, row and field."""
    rows = data.read_lines(path)
    if not rows:
        raise SystemExit(f"{path}: {'no rows there' if Path(path).exists() else 'no such file'}")
    for number, row in enumerate(rows, 1):
        for name in {"id", "image", "problem", "problem_type", "options", "solution", "response", *needed} - set(row):
            raise SystemExit(f"{path}: row {number} ({row.get('id')}): {name}: is missing")
        if "score" in needed and (type(row["score"]) not in (int, float) or not 0 <= row["score"] <= 1):
            raise SystemExit(f"{path}: row {number} ({row['id']}): score: must be a number from 0 to 1, is "
                             f"{data.show(row['score'])}")
    return rows


def write_rows(path, rows):
    """Rows as JSON lines, in place of what was there."""
    data.write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def key_of(row):
    """What a (question, response) pair goes by: its question's id and picture, never the question's text, which other
    pictures share (the released training set mixed them up)."""
    return json.dumps([row["id"], row["image"], row["response"]])


def example_of(row):
    """The Example that a row is about."""
    return data.Example(row["id"], row["problem"], row["problem_type"], tuple(row["options"]), row["solution"],
                        row["image"], "")


def by_question(rows):
    """Lists of rows of one question (and picture) each."""
    groups = {}
    for row in rows:
        groups.setdefault((row["id"], row.get("image")), []).append(row)
    return list(groups.values())


def collect(args):
    """The pool of different (question, response) pairs from runs that had --save_rollouts."""
    rows = [row for run in args.runs for row in read_rows(Path(run, "rollouts.jsonl"), "step")]
    rows, pool = [row for row in rows if row.get("held_out", False) == args.held_out], {}
    if not rows:
        raise SystemExit(f"{', '.join(args.runs)}: no such responses there; was the run made with --save_rollouts?")
    for row in rows:
        pool.setdefault(key_of(row), row)
    write_rows(args.out, pool.values())
    print(f"{len(rows)} responses, {len(pool)} different ones to {len(by_question(rows))} questions: {args.out}")


def annotate(args):
    """A score and, where the judge gives one, a critique for each pair. What is in --out already isn't asked again."""
    rows, unscored = {key_of(row): row for row in read_rows(args.rows)}, 0
    done = {key_of(row) for row in data.read_lines(args.out)}
    groups = by_question([row for key, row in rows.items() if key not in done])
    judge = None if args.judge == "toy" else ThinkingRewardModel(
        *load(args.judge, args.device, max_pixels=args.max_pixels), args.rm_mode, args.rm_prompt)
    for group in progress(groups, desc=f"scoring {sum(map(len, groups))} responses"):
        texts = [row["response"] for row in group]
        if judge:
            scores = judge.score([example_of(group[0])], [texts])[0].tolist()
            labels = [{"score": round(score, 6)} for score in scores]
        else:
            question = data.toy_question(group[0]["id"])
            labels = [{"score": question.soundness(text), "critique": question.critique(text),
                       "faults": question.faults(text)[0]} for text in texts]
        for row, label in zip(group, labels):
            if math.isnan(label["score"]):
                unscored += 1
            else:
                data.append_line(args.out, json.dumps({**row, **label}))
    print(f"{len(data.read_lines(args.out))} of {len(rows)} responses have a score ({len(done)} had one before), "
          f"{unscored} were left out because the judge wrote no usable one: {args.out}")


def balance(args):
    """Drop what isn't fit to learn from, then even the scores out, with a histogram before and after."""
    rows = read_rows(args.rows, "score")
    fit = filter_rows(rows, args.longest)
    even = balance_by_score(fit, args.per_interval, args.seed)
    write_rows(args.out, even)
    counts = [[sum(interval(row["score"]) == n for row in part) for n in range(11)] for part in (rows, fit, even)]
    print(f"{'score':>10}{'before':>10}{'fit':>10}{'after':>10}")
    for n, line in enumerate(zip(*counts)):
        print(f"{'1.0' if n == 10 else f'{n / 10}-{(n + 1) / 10}':>10}" + "".join(f"{count:>10}" for count in line))
    print(f"{'all':>10}{len(rows):>10}{len(fit):>10}{len(even):>10}   {args.out}")

    def bars(axis):
        for shift, (name, part) in enumerate(zip(("before", "after"), counts[::2])):
            axis.bar([n + 0.4 * shift for n in range(11)], part, 0.4, label=name)
        axis.set(xticks=range(11), xticklabels=[n / 10 for n in range(11)], xlabel="score", ylabel="responses")
        axis.legend()

    data.write_atomic(Path(args.out).with_suffix(".png"), data.plot([bars]))


def in_tenth(row):
    """Whether a row is held out: all that is about one picture, or without one about one question, goes together."""
    return zlib.crc32((Path(row["image"]).name if row["image"] else row["id"]).encode()) % 10 == 0


def train_command(args):
    """SFT of a Qwen2.5-VL on the rows, but for a tenth of the pictures, and save it for --reward_model."""
    rows = read_rows(args.rows, "score", *["critique"] * (args.rm_mode == "reason"))
    held_out = [row for row in rows if in_tenth(row) and not args.all_rows]
    rows = [{**row, "example": example_of(row)} for row in rows if args.all_rows or not in_tenth(row)]
    if not rows:
        raise SystemExit(f"{args.rows}: all {len(held_out)} rows would be held out: add --all_rows, or more rows")
    if args.shuffle_scores:
        rows = shuffled(rows, args.seed)
    torch.manual_seed(args.seed)
    steps = max(1, math.ceil(args.epochs * len(by_question(rows)) / args.per_step))
    model, processor = load(args.model, args.device, max_pixels=args.max_pixels)
    at_once = args.at_once or (1 if model.device.type == "cuda" else args.per_step)  # a card has less memory
    judge = train(model, processor, rows, steps, args.per_step, args.lr, args.rm_mode, args.seed,
                  f"SFT on {len(rows)} responses", at_once)
    data.save_folder(args.out, judge.model, judge.processor)
    print(f"{args.out}: for sophia_min.py --reward_model")
    if not args.all_rows:
        write_rows(Path(args.out, "held_out.jsonl"), held_out)
        print(f"held_out.jsonl there has {len(held_out)} rows about pictures that it didn't learn from")


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
    """How well scores (NaN for none) agree with the rows' labels. Sound means a label of data.SOUND or more."""
    scores = np.array(scores, float)
    usable = ~np.isnan(scores)
    rows, scores = [row for row, use in zip(rows, usable) if use], scores[usable]
    labels = np.array([row["score"] for row in rows])
    sound, right = labels >= data.SOUND, np.array([row.get("outcome", math.nan) for row in rows]) >= 0.5
    kinds, step = np.array([row["problem_type"] for row in rows]), np.array([row.get("step", 0) for row in rows])
    by_run = all(row.get("held_out") for row in rows)  # responses sampled before and after GRPO
    early = step == 0 if by_run else step <= np.median(step)
    when = ("before GRPO", "after GRPO") if by_run else ("first half of the steps", "second half")

    def part(chosen):
        return auc(scores[chosen & sound], scores[chosen & ~sound])

    def fault(name):  # against the rows without any fault
        faultless = np.array([not any(row["faults"].values()) for row in rows], bool)
        return auc(scores[faultless], scores[np.array([row["faults"][name] > 0 for row in rows], bool)])

    spread = len(set(labels)) > 1 and len(set(scores)) > 1
    return {
        "n": len(usable), "unscored": 1 - usable.mean(), "mae": np.abs(scores - labels).mean() if len(rows) else None,
        "spearman": np.corrcoef(ranks(labels), ranks(scores))[0, 1] if spread else 0.0, "auc": part(sound | True),
        "auc of right answers": part(right), "auc of wrong answers": part(~right),
        f"auc, {when[0]}": part(early), f"auc, {when[1]}": part(~early),
        **{f"auc, {kind}": part(kinds == kind) for kind in sorted(set(kinds))},
        **({f"auc, {name}": fault(name) for name in data.CRITERIA} if all("faults" in row for row in rows) else {}),
        "calibration": [[n / 10, labels[at].mean(), int(at.sum())] for n in range(11)
                        if (at := np.array([interval(score) == n for score in scores], bool)).any()]}


def eval_command(args):
    """Judges against labels that they weren't trained on: a table, a json and a picture."""
    groups, results = by_question(read_rows(args.rows, "score")), {}
    rows = [row for group in groups for row in group]
    for name in args.judge:
        model, processor = load(name, args.device, max_pixels=args.max_pixels)
        judge, scores = ThinkingRewardModel(model, processor, args.rm_mode, args.rm_prompt), []
        for group in progress(groups, desc=f"scores of {name}"):
            scores += judge.score([example_of(group[0])], [[row["response"] for row in group]])[0].tolist()
        results[name] = agreement(rows, scores)
    results["a constant"] = agreement(rows, [float(np.median([row["score"] for row in rows]))] * len(rows))
    data.write_json(f"{args.out}.json", results)
    names = [name for name in results["a constant"] if name != "calibration"]
    print(" " * 34 + "".join(f"{Path(name).name[-14:]:>16}" for name in results))
    for name in names:
        values = [result.get(name) for result in results.values()]
        print(f"{name:<34}" + "".join(f"{'-' if value is None else format(value, '.3g'):>16}" for value in values))

    def calibration(axis):
        for name, result in results.items():
            axis.plot(*zip(*[point[:2] for point in result["calibration"]]), "o-", label=Path(name).name)
        axis.plot([0, 1], [0, 1], ":", color="grey")
        axis.set(xlabel="score", ylabel="mean label")
        axis.legend()

    def separation(axis):
        shown = [name for name in names if name.startswith("auc")]
        for name, result in results.items():
            values = np.array([result.get(row) for row in shown], float)  # None is NaN
            axis.plot(values, range(len(shown)), "o", label=Path(name).name)
        axis.set(yticks=range(len(shown)), yticklabels=shown, xlim=(0, 1), xlabel="sound above flawed")
        axis.invert_yaxis()

    data.write_atomic(f"{args.out}.png", data.plot([calibration, separation]))
    print(f"{args.out}.json, {args.out}.png")


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line that say what was meant."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; --help lists all\n")

    def parse_args(self, argv=None):
        args, unknown = self.parse_known_args(argv)
        if unknown:
            commands = next((a.choices for a in self._actions if isinstance(a.choices, dict)), {})
            names = [name for parser in (self, *commands.values()) for name in parser._option_string_actions]
            near = difflib.get_close_matches(unknown[0], names, 1)
            self.error(f"{unknown[0]}: there is no such option" + (f"; do you mean {near[0]}?" if near else ""))
        return args


def main(argv=None):
    """python reward_model.py collect|annotate|balance|train|eval"""
    parser = Parser(prog="reward_model.py", description=
                    "From the responses of a run to a thinking reward model (paper, section 3.2), and how good it is.")
    commands = parser.add_subparsers(required=True, metavar="collect|annotate|balance|train|eval")

    def command(function, name, **options):
        about = function.__doc__
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(run=function)
        for option, (default, about, *choices) in options.items():
            how = {"action": "store_true"} if default is False else {
                "required": default is None, "default": default,
                "type": str if default is None else type(default), "choices": choices or None}
            sub.add_argument(f"--{option}", help=f"{about} (default: {default})" if default else about, **how)
        return sub

    model = {"device": ("auto", "auto, cpu, cuda or cuda:N"), "max_pixels": (1003520, "of pictures")}
    mode = {"rm_mode": ("", "as in sophia_min.py; left out: as it was trained, else generate",
                        "generate", "expected", "reason"),
            "rm_prompt": ("", "file with a judge's prompt of your own, see the README")}
    seed = {"seed": (0, "of everything random")}
    command(collect, "collect", out=(None, "file to write"), held_out=(
        False, "those to questions that the run held out, for eval, instead of those it trained on")
        ).add_argument("runs", nargs="+", help="folders of runs")
    for function, name, options in [
        (annotate, "annotate", {"judge": (None, "toy (the oracle), a Hugging Face id or a folder"),
                                "out": (None, "file to write, or to go on with"), **mode, **model}),
        (balance, "balance", {"per_interval": (15000, "at most so many rows a score interval (paper, section 3.2)"),
                              "longest": (4000, "characters of a response"), "out": (None, "file to write"), **seed}),
        (train_command, "train", {
            "model": (None, "what to start from: a Hugging Face id or a folder"), "out": (None, "folder to write"),
            "rm_mode": ("generate", "generate (the number; also for expected) or reason (critique, then number)",
                        "generate", "reason"),
            "epochs": (2.0, "passes over the questions (paper, section 3.2)"),
            "per_step": (8, "questions a step (ours)"),
            "at_once": (0, "of them a backward pass: memory, not results (default: 1 on CUDA, else all)"),
            "lr": (1e-5, "AdamW learning rate (ours)"),
            "all_rows": (False, "hold no tenth back: there are other rows to judge it by"),
            "shuffle_scores": (False, "learn scores that mean nothing: the untrained judge of Table 3"), **seed,
            **model}),
        (eval_command, "eval", {"out": ("eval", "name of the json and the picture"), **mode, **model}),
    ]:
        sub = command(function, name, **options)
        sub.add_argument("rows", help="JSON lines")
        if name == "eval":
            sub.add_argument("--judge", nargs="+", required=True, help="Hugging Face ids or folders to compare")
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except data.DataError as error:
        raise SystemExit(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"{str(error).splitlines()[0]} What helps: --max_pixels below {args.max_pixels}, a smaller "
                         "model, a larger card.") from error


if __name__ == "__main__":
    main()
