"""sophia_min: SophiaVL-R1's Trust-GRPO (arXiv 2505.17018) in one readable file.

    python sophia_min.py                                  # the toy world on a CPU: learns in 8 to 15 min
    python sophia_min.py --trust off --out runs/no_trust  # the same without Eq. 3, from the same start
    python sophia_min.py --model Qwen/Qwen2.5-VL-3B --data rows.json --image_root images    # the real one, on a GPU
    torchrun --nproc_per_node=8 sophia_min.py --model Qwen/Qwen2.5-VL-7B --data rows.json --image_root images

A question's group of N responses earns outcome rewards by rule (R^o) and thinking rewards from a judge (R^t). If wrong
answers got the better thinking scores, the judge's weight gamma falls (Eq. 3); its share fades with time (Eq. 5); the
rewards become advantages in the group (Eq. 6) of a clipped update that stays near a frozen reference (Eq. 7).

Departures from the paper:
- OCR: exp(-WER), as released: -WER is never >= 0.5, so Eq. 1 would never call a reading right.
- The wrong format earns R^o = 0 (as the authors say elsewhere), and is judged all the same.
- Eq. 1-2 with nobody right or nobody wrong: gamma = 1. A score that the judge didn't give drops the group's thinking
  term, and is counted. Eq. 6: unbiased std + 1e-6, as released, and exact zeros where all rewards are equal.
- Eq. 7: one ratio a token, as released (paper: a response); the mean over a response's tokens, then over responses
  (released: over all tokens).
- The judge reads the whole response, answer included (paper: question and thinking), and one that we train may check
  the claims in writing before it scores (the toy's does).
- Picture ids are ruled out, in sampling and in log-probabilities. Against the released code: no entropy bonus (1e-3
  there), top_p 1 (0.9 there, ignored by its update), a quarter of its max_pixels.
"""
import copy
import inspect
import json
import math
import os
import re
import sys
import time
import zlib
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from statistics import fmean as mean
from typing import Literal

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import linear
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint as recompute
from transformers import DynamicCache, GenerationConfig, Qwen2_5_VLForConditionalGeneration, set_seed

import data
from data import RANK, WORLD, device_and_dtype, load, progress

# -------- settings

PAPER, TRUST, RELEASED, OURS = "paper, section 4", "paper, section 3.4", "released config", "ours"

def setting(default, help, source=OURS):
    """A field of Config; --help names the source of its default."""
    shown = default if isinstance(default, str) else str(default).lower()
    return field(default=default, metadata={"help": f"{help} ({shown}: {source})"})

@dataclass
class Config:
    """All settings of a run, the paper's where it names one; TOY below replaces some with --model toy."""
    model: str = setting("toy", "toy, an id or a folder")
    data: str = setting("toy", "toy, toy-shifted (new kinds), toy-shortcut (haste pays) or a .json or .jsonl file")
    toy_pixels: int = setting(448, "width and height of the toy's pictures")
    image_root: str | None = setting(None, "folder that picture paths start from; none: the file's")
    reward_model: str = setting(
        "bunny127/SophiaVL-R1-Thinking-Reward-Model-3B", "toy (learns from its oracle), none (plain GRPO), base (Table "
        "3's untrained; the toy's learns shuffled scores), misled (the toy's, praises haste), an id or a folder",
        "paper, section 3.2")
    rm_mode: Literal["generate", "expected", "reason"] | None = setting(None, "it writes a number, as in the "
        "paper, or gives the mean of those it might write, or checks claims first; none: as trained, else generate")
    rm_prompt: str | None = setting(None, "file with a judge's prompt: text with {question}, {response}, {image}")
    trust: Literal["paper", "released", "off"] = setting("paper", "Eq. 3, the official gating, or gamma = 1", TRUST)
    anneal: bool = setting(True, "Eq. 5 (true) or Eq. 4 (false)", TRUST)
    alpha: float = setting(0.3, "weight of the thinking reward, Eq. 4", PAPER)
    kl_coef: float = setting(0.04, "beta of Eq. 7; 0 needs no reference", PAPER)
    clip_eps: float = setting(0.2, "epsilon of Eq. 7", RELEASED)
    group_size: int = setting(8, "responses a question, N", PAPER)
    questions_per_step: int = setting(16, "questions a step", RELEASED)
    steps: int = setting(1500, "T of Eq. 5", PAPER)
    lr: float = setting(5e-7, "AdamW's learning rate", PAPER)
    inner_epochs: int = setting(1, "updates on one rollout; with 1 the clip never acts", RELEASED)
    temperature: float = setting(1.0, "of sampling, and of the update's log-probabilities", RELEASED)
    max_new_tokens: int = setting(1024, "longest response", RELEASED)
    min_new_tokens: int = setting(0, "shortest response, for benchmarks")
    max_pixels: int = setting(1003520, "larger pictures are scaled down (28 x 28 a token); released: 4194304")
    max_prompt_tokens: int = setting(8192, "a longer prompt is an error, never cut", RELEASED)
    micro_batch: int = setting(4, "responses a backward pass: memory, not results")
    freeze_vision: bool = setting(False, "don't train the vision tower")
    lora: int = setting(0, "rank of adapters to train instead of all weights; --lr is then 10 times as high")
    adapter: str | None = setting(None, "folder of an adapter to start from or to evaluate, from --lora or from peft")
    offload_optimizer: bool | None = setting(None, "AdamW on the host; none: on one GPU, without --lora")
    seed: int = setting(0, "of all chance")
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    attn: Literal["auto", "sdpa", "flash_attention_2", "eager"] = setting("auto", "auto: flash-attn if it can be")
    save_every: int = setting(100, "steps between checkpoints")
    save_rollouts: bool = setting(False, "write all responses to rollouts.jsonl, for reward_model.py")
    skip_bad: bool = setting(False, "leave bad rows out, listed in skipped.jsonl")
    out: str = setting("runs/sophia", "folder for what the run leaves")
    resume: str | None = setting(None, "continue the run in this folder; flags beside it win over its own")
    eval_only: bool = setting(False, "greedy accuracy per problem type, no training")

TOY = dict(toy_pixels=56, reward_model="toy", questions_per_step=8, steps=70, lr=1e-4, max_new_tokens=80,
           micro_batch=64, save_every=25, out="runs/toy")  # defaults with --model toy, where they differ
TRAINED_HERE = ("toy", "base", "misled")  # judges that learn from the toy world's oracle
KEPT = ("model", "reward_model", "freeze_vision", "lora", "adapter", "eval_only")  # what a resumed run can't change
LEAST = dict(toy_pixels=28, alpha=0, kl_coef=0, clip_eps=1e-6, group_size=2, questions_per_step=1, steps=1, lr=1e-12,
             inner_epochs=1, temperature=1e-3, max_new_tokens=1, min_new_tokens=0, max_pixels=3136, micro_batch=1,
             max_prompt_tokens=1, lora=0, seed=0, save_every=1)

# -------- section 3.3: the outcome reward R^o

def extract_answer(response: str) -> str | None:
    """What stands in the one <answer> block after the last </think>; None if the response has any other form."""
    thinking, end_of_thinking, rest = response.strip().rpartition("</think>")
    rest = rest.strip()
    if not (end_of_thinking and thinking.startswith("<think>")
            and rest.startswith("<answer>") and rest.endswith("</answer>")):
        return None
    answer = rest[len("<answer>"):-len("</answer>")]
    return None if any(tag in answer for tag in ("<answer>", "</answer>", "<think>")) else answer.strip()

def outcome_reward(response: str, solution: str, problem_type: str, options: list[str] = ()) -> float:
    """R^o in [0, 1] of a response, by the rule of its problem type; 0 for the wrong format or an empty answer or truth.
    `solution` may carry <answer> tags. Raises ValueError for an unknown type."""
    if problem_type not in data.PROBLEM_TYPES:
        raise ValueError(f"unknown problem_type {problem_type!r}, known are {', '.join(data.PROBLEM_TYPES)}")
    answer = data.visible(extract_answer(response) or "")
    truth = data.visible(solution.strip().removeprefix("<answer>").removesuffix("</answer>"))
    if not answer or not truth:
        return 0.0
    if problem_type == "numerical":
        return float(data.same_value(answer, truth))
    if problem_type == "multiple choice":
        chosen = data.chosen_options(answer, options)  # empty for a hedge, which is never right
        return float(bool(chosen) and chosen == data.chosen_options(truth, options))
    if problem_type == "OCR":
        return math.exp(-data.word_error_rate(answer, truth))  # the paper's -WER would never reach the 0.5 of Eq. 1
    return data.rouge(answer, truth)  # free-form, text

def reward_of(example, text):
    """R^o of a response to an Example."""
    return outcome_reward(text, example.solution, example.problem_type, example.options)

# -------- section 3.4: Trust-GRPO, Eq. 1-7

def trust_weight(outcome, thinking):
    """gamma [] in [1/e, 1]: how far a group's thinking rewards R^t [G] can be trusted, given its outcomes R^o [G]. An
    empty side leaves nothing to compare: 1 (ours). NaN in `thinking` gives NaN."""
    correct = outcome >= 0.5  # [G]
    if correct.all() or not correct.any():
        return thinking.sum() * 0 + 1
    mu_c = thinking[correct].mean()  # Eq. 1
    mu_w = thinking[~correct].mean()  # Eq. 2
    return (mu_c - mu_w).clamp(max=0).exp()  # Eq. 3: exp(mu_c - mu_w) where wrong answers think better, else 1

def annealing(step, total_steps):
    """The factor exp(-step / T) of Eq. 5, for step = 1 .. T: it ends at 1/e, never at 0."""
    return math.exp(-step / total_steps)

def released_gate(outcome, thinking):
    """The official code's gating: 1 where R^t counts, else 0 [G]. Responses with R^o < 0.2 get R^t = 0, groups all
    >= 0.9 or all <= 0.1 lose the term. So mu_w = 0 on 0/1 outcomes, and gamma is always 1."""
    if (outcome >= 0.9).all():
        return torch.zeros_like(thinking)
    return (outcome >= 0.2).to(thinking.dtype)  # all 0 where all are <= 0.1

def trusted(outcome, thinking, trust="paper"):
    """(R^t [G] as `trust` takes it, gamma []): paper (Eq. 3), released (the official gating) or off (gamma 1). NaN says
    that the judge gave no usable score: where one that counts is missing, zeros and gamma 0, which drops the term."""
    if trust == "released":
        thinking = torch.where(released_gate(outcome, thinking) == 1, thinking, 0.0)
    if thinking.isnan().any():
        return torch.zeros_like(thinking), thinking.new_zeros(())
    return thinking, thinking.new_ones(()) if trust == "off" else trust_weight(outcome, thinking)

def combined_reward(outcome, thinking, step, total_steps, alpha=0.3, trust="paper", anneal=True, gamma=None):
    """R [G] of one group from R^o and R^t [G]; with `gamma`, `thinking` was `trusted` already."""
    if gamma is None:
        thinking, gamma = trusted(outcome, thinking, trust)
    share = annealing(step, total_steps) if anneal else 1.0
    return outcome + gamma * alpha * share * thinking  # Eq. 5; Eq. 4 without the share

def group_advantages(rewards):
    """A [G]: each reward against its group. Equal rewards give exact zeros: in fp32 eight times 0.7 has a "spread" of
    6e-8, which the division would blow up."""
    if (rewards == rewards[0]).all():
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / (rewards.std() + 1e-6)  # Eq. 6

def kl_k3(logp, ref_logp):
    """KL(pi_theta || pi_ref) a token, never negative: k3 of Schulman, "Approximating KL divergence"."""
    log_ratio = ref_logp - logp
    return log_ratio.exp() - log_ratio - 1

def grpo_loss(logp, old_logp, ref_logp, advantages, mask, clip_eps=0.2, kl_coef=0.04, n_responses=None):
    """-J of Eq. 7 for G responses of at most R tokens: logp, old_logp, ref_logp, mask [G, R], advantages [G]. The mean
    over a response's tokens, then the sum over responses / n_responses (default G): with the whole batch's number,
    the losses of micro-batches add up to the loss of the batch. Returns (loss, metrics that add up the same way)."""
    is_token = mask.bool()  # [G, R]; padding may hold anything
    ratio = torch.where(is_token, logp - old_logp, 0.0).exp()  # [G, R], r_i a token
    advantage = advantages[:, None].to(logp.dtype)  # [G, 1]
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)  # [G, R]
    surrogate = torch.min(ratio * advantage, clipped * advantage)  # [G, R]
    kl = kl_k3(torch.where(is_token, logp, 0.0), torch.where(is_token, ref_logp, 0.0))  # [G, R]
    per_token = surrogate - kl_coef * kl  # [G, R], Eq. 7 inside the mean

    def mean_over_responses(values):  # [G, R] -> []
        per_response = (values * is_token).sum(1) / is_token.sum(1).clamp(min=1)  # [G]
        return per_response.sum() / (n_responses or len(logp))

    clipped_tokens = (ratio * advantage > clipped * advantage).to(logp.dtype)  # [G, R]: the clip stops their gradient
    metrics = {"kl": mean_over_responses(kl).item(), "clip_frac": mean_over_responses(clipped_tokens).item()}
    return -mean_over_responses(per_token), metrics  # Eq. 7

# -------- one prompt, many continuations
# To read on, it is enough to know that target_logits(model, prefix, rows, targets) are those of the plain computation,
# prompt and response in one sequence, though a group's prompt is computed once. The tests hold both together.

FORWARD = inspect.signature(Qwen2_5_VLForConditionalGeneration.forward).parameters
CACHE = "cache" if "cache" in FORWARD else "past_key_values"  # the name before transformers 5.24

def pad(rows, side, value=0):
    """Lists of token ids as one tensor [N, L], padded left or right, and its mask (1 where a token is)."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side=side)
    return pad_sequence(ids, batch_first=True, padding_side=side, padding_value=value), mask

class PrefixCache:
    """The keys and values of what a question's rows (responses to sample, to train on or to judge) begin with: picture
    and text pass through the model once, and all rows go on from copies. Exact, since a prompt never sees what follows.
    Where the picture stands behind what differs, each row is computed by itself. Positions are always given: Qwen2.5-VL
    otherwise takes them from state left by an earlier call, or counts them in one dimension, in silence. `groups`: the
    data.Prompts of each question's rows, N in all. B prefixes are padded on the left; owner [N] is a row's prefix,
    tails [N] what is left of its prompt, at least a token."""

    def __init__(self, model, groups):
        config, prefixes, owner, self.tails = model.config, [], [], []
        for prompts in groups:
            common = os.path.commonprefix([prompt.ids[:-1] for prompt in prompts])
            alone = config.image_token_id in prompts[0].ids[len(common):]  # the picture is behind what differs
            for n, prompt in enumerate(prompts):
                if n == 0 or alone:
                    prefixes.append(replace(prompt, ids=prompt.ids[:-1] if alone else common))
                owner.append(len(prefixes) - 1)
                self.tails.append(prompt.ids[len(prefixes[-1].ids):])
        sharded = isinstance(model, FSDPModule)  # over ranks, which must pass through each layer equally often
        if sharded and all(prefix.pixel_values is None for prefix in prefixes):
            prefixes.append(data.blank_picture(config))
        ids, mask = pad([prefix.ids for prefix in prefixes], "left", config.text_config.pad_token_id or 0)
        self.owner, self.ids, self.mask = torch.tensor(owner), ids.to(model.device), mask.to(model.device)  # [B, P]
        pictures, vision = [prefix for prefix in prefixes if prefix.pixel_values is not None], {}
        if pictures:
            vision = dict(pixel_values=torch.cat([p.pixel_values for p in pictures]).to(model.device, model.dtype),
                          image_grid_thw=torch.cat([p.grid for p in pictures]).to(model.device))
        is_image = ((self.ids == config.image_token_id) & (self.mask == 1)).int()  # [B, P]
        self.positions, delta = model.model.get_rope_index(  # [3, B, P], [B, 1]
            self.ids, mm_token_type_ids=is_image, image_grid_thw=vision.get("image_grid_thw"), attention_mask=self.mask)
        self.next_position = self.mask.sum(-1) + delta.squeeze(-1)  # [B]
        output = model(input_ids=self.ids, attention_mask=self.mask, position_ids=self.positions, use_cache=True,
                       logits_to_keep=1, **vision)
        if getattr(output, CACHE) is None:
            raise RuntimeError("the model dropped its cache: switch gradient checkpointing off, it works against it")
        self.keys_values = [(layer.keys, layer.values) for layer in getattr(output, CACHE).layers]  # [B, heads, P, dim]
        self.end = [output.logits] if sharded else []  # where FSDP's backward pass must start

    def inputs(self, rows, ids, mask):
        """The model's arguments for ids [n, T] that continue the prefixes of `rows` [n]."""
        owner, ids, mask, cache = self.owner[rows], ids.to(self.ids), mask.to(self.mask), DynamicCache()
        for layer, (keys, values) in enumerate(self.keys_values):
            cache.update(keys[owner], values[owner], layer)
        positions = self.next_position[owner, None] + (mask.cumsum(-1) - 1).clamp(min=0)  # [n, T], all text
        return {"input_ids": ids, "attention_mask": torch.cat([self.mask[owner], mask], 1),
                "position_ids": positions.expand(3, -1, -1), "use_cache": True, CACHE: cache}

    def detached(self):
        """Keys and values become leaves, where continuations' backward passes add up; `backward` goes on."""
        self.computed = [tensor for pair in self.keys_values for tensor in pair]
        self.leaves = [tensor.detach().requires_grad_() for tensor in self.computed]
        self.keys_values = list(zip(self.leaves[::2], self.leaves[1::2]))
        return self

    def backward(self):
        """The second half of the backward pass: from the keys and values that depend on what is trained into the
        prompt. FSDP gathers a layer when the pass reaches its output: it starts, with zeros, at the model's end."""
        pairs = [(tensor, leaf.grad) for tensor, leaf in zip(self.computed, self.leaves) if tensor.requires_grad]
        pairs += [(end, torch.zeros_like(end)) for end in self.end]
        if pairs:
            torch.autograd.backward(*zip(*pairs))

def target_logits(model, prefix, rows, targets):
    """logits [n, R, V] that predict targets[n]: each of `rows` [n] reads its prefix, its tail and its target so far."""
    tail_ids, tail_mask = pad([prefix.tails[row] for row in rows], "left")
    target_ids, target_mask = pad(targets, "right")
    ids, mask = torch.cat([tail_ids, target_ids], 1)[:, :-1], torch.cat([tail_mask, target_mask], 1)[:, :-1]
    return model(**prefix.inputs(rows, ids, mask), logits_to_keep=target_ids.shape[1]).logits

# -------- rollout: responses and their log-probabilities

@torch.no_grad()
def generate(model, prefix, max_new_tokens, temperature=None, logits=False, **limits):
    """New token ids [N, R] for all rows of `prefix`, sampled at `temperature` or greedily, and, with `logits`, their
    logits [N, R, V], filtered. Of the checkpoint's own generation settings only the end ids count."""
    inputs = prefix.inputs(torch.arange(len(prefix.tails)), *pad(prefix.tails, "left"))
    inputs["input_ids"] = torch.cat([prefix.ids[prefix.owner], inputs["input_ids"]], 1)  # it wants the whole sequence
    inputs["position_ids"] = torch.cat([prefix.positions[:, prefix.owner], inputs["position_ids"]], 2)
    if temperature:
        limits |= dict(do_sample=True, temperature=temperature, top_k=0)
    theirs, model.generation_config = model.generation_config, GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=end_ids(model), pad_token_id=end_ids(model)[0],
        output_scores=logits, return_dict_in_generate=True, **limits)
    try:
        with kept_whole(model):
            out = model.generate(**inputs, synced_gpus=False)
    finally:
        model.generation_config = theirs
    return out.sequences[:, inputs["input_ids"].shape[1]:], torch.stack(out.scores, 1) if logits else None

def end_ids(model):
    """Ids that end a response; the first one ends a turn of the chat template."""
    eos = model.generation_config.eos_token_id
    return eos if isinstance(eos, list) else [eos]

def vision_ids(model):
    """Ids that stand for pictures [4]: sampled, they would ask for a picture that isn't there."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return torch.tensor([getattr(model.config, name) for name in names], device=model.device)

def response_mask(ids, eos_ids):
    """1 up to the first end-of-sequence token and on it, 0 behind it [N, R]. Not by padding, which may be EOS, too."""
    ended = torch.isin(ids, torch.tensor(eos_ids, device=ids.device)).long()  # [N, R]
    return (ended.cumsum(1) - ended == 0).long()

@dataclass
class Rollout:
    """What the policy wrote: N = questions x G responses, a question's together."""
    prompts: list  # one data.Prompt a question
    ids: torch.Tensor  # [N, R]
    mask: torch.Tensor  # [N, R]
    texts: list  # N
    truncated: int  # responses cut at max_new_tokens, without an end
    logits: torch.Tensor = None  # if asked for: those that generate drew from [N, R, V]
    prefix: PrefixCache = None  # if asked for: the prompts' computation, for one update to go on from

def rollout(policy, processor, examples, group_size, config, greedy=False, logits=False, grad=False):
    """G responses to each question, by one `generate` for all. `grad`: the prompts' computation is kept for the update.
    """
    prompts = [processor.question(example) for example in examples]
    with torch.set_grad_enabled(grad):
        prefix = PrefixCache(policy, [[prompt] * group_size for prompt in prompts])
    ids, logits = generate(policy, prefix, config.max_new_tokens, None if greedy else config.temperature, logits,
                           min_new_tokens=config.min_new_tokens or None, suppress_tokens=vision_ids(policy).tolist())
    mask, ends = response_mask(ids, end_ids(policy)), end_ids(policy)
    texts = [processor.opening + processor.decode(row[is_token == 1], ends) for row, is_token in zip(ids, mask)]
    truncated = int((~torch.isin(ids, torch.tensor(ends, device=ids.device)).any(1)).sum())
    return Rollout(prompts, ids, mask, texts, truncated, logits, prefix if grad else None)

def token_logps(logits, ids, temperature, forbidden, no_end=0, eos_ids=()):
    """Log-probabilities and entropies [N, R] of the tokens `ids` under the distribution that they came from: the same
    temperature, the same ids ruled out everywhere (`forbidden`) or in the first `no_end` places (`eos_ids`). In fp32,
    some rows at a time, and again in the backward pass: 1,024 tokens over 150k words are 0.6 GB."""
    def chunk(logits, ids):
        scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature  # [n, R, V]
        allowed = scaled.index_fill(-1, forbidden, -math.inf)
        allowed[:, :no_end, list(eos_ids)] = -math.inf
        logp = scaled.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - allowed.logsumexp(-1)  # [n, R]
        with torch.no_grad():
            entropy = torch.special.entr(allowed.softmax(-1)).sum(-1)  # [n, R]
        return logp, entropy  # finite even where an id is ruled out

    rows = max(1, 2 ** 27 // logits[0].numel())
    parts = [recompute(chunk, *part, use_reentrant=False)
             for part in zip(logits.split(rows), ids.to(logits.device).split(rows))]
    return tuple(map(torch.cat, zip(*parts)))

def response_logps(model, prefix, batch, rows, first, config):
    """token_logps of the responses `rows` [n] of a Rollout, cut to the longest of them; `prefix` has its prompts from
    row `first` on."""
    width = int(batch.mask[rows].sum(1).max())
    ids = batch.ids[rows, :width]  # [n, R]
    logits = target_logits(model, prefix, rows - first, ids.tolist())  # [n, R, V]
    return token_logps(logits, ids, config.temperature, vision_ids(model), config.min_new_tokens, end_ids(model))

def responses(policy, processor, examples, each, at_once, config, desc, greedy=False):
    """(Example, text) of `each` responses to every example, for `at_once` examples at a time."""
    for first in progress(range(0, len(examples), at_once), desc=desc):
        part = examples[first:first + at_once]
        texts = rollout(policy, processor, part, each, config, greedy).texts
        yield from zip((example for example in part for _ in range(each)), texts)

# -------- section 3.2: the thinking reward R^t

CRITERIA = {  # the five of the paper's Table 4, in our words
    "logical soundness": "each step follows from the steps before",
    "correct reasoning": "facts and methods are right, as the picture shows them",
    "error identification": "no flaw, no guess, no unsupported assumption",
    "language consistency": "one language throughout",
    "redundancy": "concise, nothing said twice",
}
JUDGE_PROMPT = "Rate how well the answers below are thought through. " + " ".join(
    f"{name}: {meaning}." for name, meaning in CRITERIA.items())
JUST_THE_SCORE = " Write one number from 0 to 1, in steps of 0.1, and nothing else."
DELIMITER, ASK = "score:", "Rate it."
JUDGE_FORM = {"generate": JUST_THE_SCORE, "expected": JUST_THE_SCORE, "reason": (
    f' First check each claim in the thinking, in a few words. Then write "{DELIMITER}" and one number from 0 to 1, in '
    "steps of 0.1.")}
TAGGED = JUST_THE_SCORE[:-1] + ", as <answer>score</answer>."
# How the released reward model is asked, in our words: text first, the response inside it, the picture last.
RELEASED_LAYOUT = JUDGE_PROMPT.replace("answers below are", "response below is") + (
    " Judge how it thinks, not whether its final answer is right, and be strict: 1.0 is for thinking without a flaw, "
    "0.0 for thinking without worth.\n\nQuestion: {question}\n\nResponse: {response}\n\n") + ASK
LONGEST_VERDICT = {"generate": 24, "reason": 128}  # tokens; <answer>0.7</answer> has 9
SPELLINGS = {**{f"{n / 10:.1f}": n / 10 for n in range(11)}, "0": 0.0, "1": 1.0}  # what `expected` takes the mean of

def parse_score(text):
    """The judge's score: the whole text must be one plain number in [0, 1], bare or in a pair of answer tags, else None
    ("no score", which is not 0)."""
    number = re.fullmatch(r"\s*(<answer>)?\s*([01](\.[0-9]{1,6})?|\.[0-9]{1,6})\s*(?(1)</answer>)\s*", text, re.ASCII)
    return float(number[2]) if number and float(number[2]) <= 1 else None

class ThinkingRewardModel:
    """A frozen Qwen2.5-VL that reads picture, question and response and gives one number in [0, 1], R^t. By `mode`, it
    writes that number (generate, the paper's way), or gives its mean under its own probabilities, to 0.1 (expected), or
    checks the claims in writing before (reason: that theirs can't is the limit that the authors name). One that
    `reward_model.train` made remembers its mode, and is asked in our layout, picture first; any other in that of the
    released one, or in `template`, a file."""

    def __init__(self, model, processor, mode=None, template=None):
        self.model, self.processor, made = model.eval().requires_grad_(False), processor, getattr(
            model.config, "rm_mode", None)
        self.mode = mode or made or "generate"
        form = JUDGE_FORM[self.mode].replace(JUST_THE_SCORE, TAGGED)
        self.template = None if made else RELEASED_LAYOUT + form + "{image}"
        if template:
            self.template = Path(template).read_text()
            if any(self.template.count(name) != 1 for name in ("{question}", "{response}", "{image}")):
                raise SystemExit(f"{template}: must hold {{question}}, {{response}} and {{image}}, each once")
        forms = ("{}", "<answer>{}</answer>") if self.template else ("{}",)
        self.spellings = {form.format(text): score for form in forms for text, score in SPELLINGS.items()}

    def prompt(self, example, response):
        """The data.Prompt in which it reads one response, in a turn of its own or (template) in the user's: no text can
        spell what ends a turn."""
        question = data.question_text(example)
        if self.template:
            known = {"{question}": question, "{response}": response, "{image}": data.PICTURE}
            parts = re.split(r"(\{(?:question|response|image)\})", self.template)
            return self.processor.chat([("system", "You are a helpful assistant."),
                                        ("user", *(known.get(part, part) for part in parts))], example.image)
        return self.processor.chat([("system", JUDGE_PROMPT + JUDGE_FORM[self.mode]), ("user", data.PICTURE, question),
                                    ("assistant", response), ("user", ASK)], example.image)

    @torch.no_grad()
    def score(self, examples, groups):
        """R^t [Q, G] of the responses groups[q][i] to examples[q]; NaN where the judge wrote no usable score."""
        prompts = [[self.prompt(example, text) for text in texts] for example, texts in zip(examples, groups)]
        if self.mode == "expected":  # to 0.1: Eq. 6 would blow noise of 0.001 up in a group that is all right
            scores = [round(self.expected(prompt), 1) for group in prompts for prompt in group]
        else:
            at_once = max(1, 64 // len(groups[0]))  # questions
            scores = [score for first in range(0, len(prompts), at_once)
                      for score in self.written(prompts[first:first + at_once])]
        return torch.tensor(scores).view(len(examples), -1)

    def written(self, prompts):
        """The score that the judge writes for each of the Prompts [Q][G], in one list; NaN for none."""
        new, _ = generate(self.model, PrefixCache(self.model, prompts), LONGEST_VERDICT[self.mode])
        ends = end_ids(self.model)
        texts = [self.processor.decode(row, ends) if set(row.tolist()) & set(ends) else "" for row in new]  # cut: none
        if self.mode == "reason":
            texts = [score if found else "" for _, found, score in (t.lower().rpartition(DELIMITER) for t in texts)]
        return [math.nan if score is None else score for score in map(parse_score, texts)]

    def expected(self, prompt):
        """The mean of the scores that it might write, by their probabilities to the end of the turn."""
        written = [self.processor.encode(text) + end_ids(self.model)[:1] for text in self.spellings]
        labels, mask = pad(written, "right")  # [13 or 26, T]; with the end, since "0" begins "0.1"
        prefix = PrefixCache(self.model, [[prompt] * len(written)])
        logits = target_logits(self.model, prefix, torch.arange(len(written)), written)  # [13 or 26, T, V]
        logp = logits.double().log_softmax(-1).cpu().gather(-1, labels.unsqueeze(-1)).squeeze(-1) * mask
        scores = torch.tensor(list(self.spellings.values()), dtype=torch.float64)
        return (scores * logp.sum(-1).softmax(0)).sum().item()

# -------- the update, Eq. 7

def update(policy, reference, optimizer, batch, advantages, config):
    """The GRPO update on one rollout; advantages [N]. Returns the step's metrics. Each prompt is computed once: its
    responses, in micro-batches, leave gradients at its keys and values, which one backward pass carries through it. Old
    log-probabilities are those of the first inner epoch, before it moves anything."""
    n, old_logps, advantages = len(batch.ids), {}, advantages.to(policy.device)
    group = n // len(batch.prompts)
    together = n if batch.prefix else max(config.micro_batch // group, 1) * group  # rows whose prompts it holds
    metrics = dict(loss=0.0, kl=0.0, clip_frac=0.0, entropy=0.0, grad_norm=0.0)
    for _ in range(config.inner_epochs):
        for first in range(0, n, together):
            rows = torch.arange(first, min(first + together, n))
            prompts = [[batch.prompts[row // group]] * group for row in rows[::group].tolist()]
            prefix = (batch.prefix or PrefixCache(policy, prompts)).detached()
            ref_prefix = PrefixCache(reference, prompts) if config.kl_coef else None  # frozen: it keeps no graph
            for part in rows.split(config.micro_batch):
                logp, entropy = response_logps(policy, prefix, batch, part, first, config)  # [n, R]
                ref_logp = logp.detach()
                if config.kl_coef:
                    ref_logp, _ = response_logps(reference, ref_prefix, batch, part, first, config)
                old_logp = old_logps.setdefault(int(part[0]), logp.detach())
                mask = batch.mask[part, :logp.shape[1]].to(logp.device)
                loss, sums = grpo_loss(logp, old_logp, ref_logp, advantages[part], mask, config.clip_eps,
                                       config.kl_coef, n_responses=n)
                loss.backward()
                sums |= {"loss": loss.item(), "entropy": ((entropy * mask).sum(1) / mask.sum(1)).sum().item() / n}
                for name, value in sums.items():
                    metrics[name] += value / config.inner_epochs
            prefix.backward()
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(f"the loss is {metrics['loss']}")
        metrics["grad_norm"] += optimizer.step() / config.inner_epochs
    return metrics

# -------- one step, as in Fig. 3 of the paper

def train_step(step, policy, reference, judge, optimizer, processor, examples, config):
    """Rollout, rewards, trust, advantages, update, on this process's questions [Q]. Returns the line for log.jsonl, and
    all processes' groups."""
    times = [time.time()]
    # where a micro-batch holds all prompts, the update goes on from the rollout's computation of them
    once = config.inner_epochs == 1 and len(examples) <= max(1, config.micro_batch // config.group_size)
    batch = rollout(policy, processor, examples, config.group_size, config, grad=once)
    groups = [batch.texts[i:i + config.group_size] for i in range(0, len(batch.texts), config.group_size)]
    times.append(time.time())
    outcome = torch.tensor([[reward_of(example, text) for text in texts] for example, texts in zip(examples, groups)],
                           dtype=torch.float64)  # R^o [Q, G], section 3.3
    thinking = judge.score(examples, groups).double() if judge else torch.full_like(outcome, math.nan)  # R^t, 3.2
    times.append(time.time())
    weighed, gammas = map(torch.stack, zip(*[
        trusted(*group, config.trust) for group in zip(outcome, thinking)]))  # R^t [Q, G] and gamma [Q], Eq. 1-3
    rewards = torch.stack([
        combined_reward(*group, step, config.steps, config.alpha, anneal=config.anneal, gamma=gamma)
        for *group, gamma in zip(outcome, weighed, gammas)])  # R [Q, G], Eq. 5
    if not rewards.isfinite().all():
        raise FloatingPointError("a reward is not finite")
    advantages = torch.stack([group_advantages(group) for group in rewards])  # A [Q, G], Eq. 6
    metrics = update(policy, reference, optimizer, batch, advantages.flatten(), config)  # Eq. 7
    times.append(time.time())
    metrics |= {"truncated": batch.truncated, "prompt_tokens": mean(len(prompt.ids) for prompt in batch.prompts),
                "format_rate": mean(extract_answer(text) is not None for text in batch.texts)}
    rows = data.group_rows(step, examples, groups, gammas.tolist(), batch.mask.sum(1),
                           outcome=outcome, thinking=thinking, reward=rewards, advantage=advantages)
    anneal = annealing(step, config.steps) if config.anneal else 1.0
    return data.log_line(step, all_gather((rows, metrics)), anneal, judge is not None, times)

# -------- self-test and evaluation

BF16_TOLERANCE = 0.05  # nats, mean; the toy in bf16 on a CPU has 0.009; wrong positions, cache or mask give 0.1 to 4

def self_test(policy, processor, examples, config):
    """Stop before training if sampling and training disagree on the log-probabilities of sampled tokens, as by one
    side's positions, cache, filter or stale state (the prompt's computation they share; the tests check that). Returns
    the difference in nats: the largest in fp32, the mean in bf16, where tokens round."""
    short = replace(config, max_new_tokens=min(config.max_new_tokens, 64),  # [N, R, V] in fp32 is large
                    min_new_tokens=min(config.min_new_tokens, 64))
    batch = rollout(policy, processor, examples, 2, short, logits=True)
    with torch.no_grad():
        prefix = PrefixCache(policy, [[prompt] * 2 for prompt in batch.prompts])
        logp, _ = response_logps(policy, prefix, batch, torch.arange(len(batch.ids)), 0, short)  # [N, R]
    sampled = batch.logits.float().log_softmax(-1).gather(-1, batch.ids.unsqueeze(-1)).squeeze(-1)  # [N, R or more]
    gaps = (logp - sampled[:, :logp.shape[1]]).abs()[batch.mask[:, :logp.shape[1]] == 1]
    exact = prefix.keys_values[0][0].dtype != torch.bfloat16
    gap, tolerance = (gaps.max().item(), 1e-4) if exact else (gaps.mean().item(), BF16_TOLERANCE)
    if not gap <= tolerance:
        raise SystemExit(f"self-test failed: sampling and training disagree by {gap:.2g} nats a token (tolerance "
                         f"{tolerance:.2g}). Check the versions of torch and transformers, try --attn sdpa")
    return gap

def evaluate(policy, processor, examples, config, desc, step=None):
    """Greedy answers, as data.evaluation counts them. Right means R^o >= 0.5, as in Eq. 1."""
    n, at_once = len(examples), max(1, config.questions_per_step * config.group_size // (2 * WORLD))
    own = [examples[i % n] for i in range(RANK, math.ceil(n / WORLD) * WORLD, WORLD)]  # as many a rank: some twice
    texts = all_gather([text for _, text in responses(policy, processor, own, 1, at_once, config, desc, greedy=True)])
    texts = [text for of_ranks in zip(*texts) for text in of_ranks][:n]  # rank r has questions r, r + WORLD, ..
    right = [int(reward_of(example, text) >= 0.5) for example, text in zip(examples, texts)]
    formed = mean(extract_answer(text) is not None for text in texts)
    return data.evaluation(examples, texts, right, formed, step if config.save_rollouts else None, config.out)

# -------- skip at first reading
# Precision, LoRA, sharding, checkpoints, the command line. Go on at "the run".

class MasterAdamW:
    """AdamW on fp32 master weights: at lr 5e-7 bf16 weights, of three digits, would swallow the steps. Gradients add up
    in fp32, too. `offload`: masters and moments, 12 bytes a weight, stay in host memory, and AdamW runs there."""

    def __init__(self, model, lr, betas=(0.9, 0.999), offload=False, average=False):
        self.average = average  # gradients over the ranks, where FSDP doesn't
        self.weights = self.masters = [weight for weight in model.parameters() if weight.requires_grad]
        if offload or model.dtype == torch.bfloat16:
            self.masters = [torch.nn.Parameter(weight.detach().to("cpu" if offload else weight.device, torch.float32,
                                                                  copy=True)) for weight in self.weights]
            for weight in self.weights:
                weight.grad_dtype = torch.float32
        self.adamw = torch.optim.AdamW(self.masters, lr=lr, betas=betas, weight_decay=0.01,  # released config
                                       fused=offload or None)

    @torch.no_grad()
    def step(self, max_norm=4.0):  # released config
        """Clip, move the masters, copy them into the model. Returns the gradient's norm, which must be finite."""
        for weight in self.weights if self.average else ():
            distributed.all_reduce(weight.grad.div_(WORLD))
        apart = [pair for pair in zip(self.weights, self.masters) if pair[0] is not pair[1]]
        for weight, master in apart:
            master.grad, weight.grad = None if weight.grad is None else weight.grad.to(master.device), None
        norm = torch.nn.utils.clip_grad_norm_(self.masters, max_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm.item()}")
        self.adamw.step()
        self.adamw.zero_grad()
        for weight, master in apart:
            weight.copy_(master)
        return norm.item()

    def state(self):
        """What a resumed run needs, in fp32 and in one piece, from any number of processes."""
        state = {"weights": [master.detach() for master in self.masters], "adamw": self.adamw.state_dict()}
        return tree_map(lambda value: on_rank_0(value) if isinstance(value, torch.Tensor) else value, state)

    @torch.no_grad()
    def restore(self, saved):
        """Put a saved state back, before the model's first forward pass; SystemExit if it is another model's."""
        def parts(tensor, like):
            if not isinstance(like, DTensor) or tensor.shape != like.shape:
                return tensor
            return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)

        if [value.shape for value in saved["weights"]] != [master.shape for master in self.masters]:
            raise SystemExit("the folder's start and its checkpoint are of two models: restore it from a copy")
        for weight, master, value in zip(self.weights, self.masters, saved["weights"]):
            master.copy_(parts(value, master))
            weight.copy_(master)
        moments = {i: {key: parts(value, self.masters[i]) for key, value in state.items()}
                   for i, state in saved["adamw"]["state"].items()}
        self.adamw.load_state_dict(saved["adamw"] | {"state": moments})

class LoRA:
    """Low-rank adapters (Hu et al., 2021) on the linear layers of a policy's language model: W x + s B A x, W frozen, B
    zero at the start, s = 2. Called like the policy, this computes without them: the reference, without a second copy.
    `base`: what saved adapters name as theirs; `folder`: one in peft's format to go on from."""

    def __init__(self, policy, rank, base, folder=None):
        self.policy, self.base, self.scale, self.on = policy.requires_grad_(False), base, 2.0, True
        self.layers = {name: layer for name, layer in policy.named_modules()
                       if isinstance(layer, torch.nn.Linear) and name.startswith("model.language_model.")}
        if folder:
            self.scale, pairs = data.read_adapter(folder, self.layers, rank)
        else:
            random = torch.Generator().manual_seed(0)  # the same on all ranks
            pairs = {name: ((torch.rand(rank, layer.in_features, generator=random) * 2 - 1) / layer.in_features ** 0.5,
                            torch.zeros(layer.out_features, rank)) for name, layer in self.layers.items()}
        self.layers = {name: self.layers[name] for name in pairs}
        for name, layer in self.layers.items():
            layer.lora_A, layer.lora_B = [torch.nn.Parameter(part.to(layer.weight)) for part in pairs[name]]
            layer.register_forward_hook(self.add)

    def add(self, layer, inputs, output):
        """A layer's output with its adapter's."""
        return output + linear(linear(inputs[0], layer.lora_A), layer.lora_B) * self.scale if self.on else output

    def __call__(self, **inputs):
        self.on = False
        try:
            return self.policy(**inputs)
        finally:
            self.on = True

    def __getattr__(self, name):  # its config, its device, ..
        return getattr(self.policy, name)

    def merged(self):
        """The policy's weights with s B A added. In bf16 that rounds: the adapter is the truth."""
        weights = {name: weight for name, weight in self.policy.state_dict().items() if ".lora_" not in name}
        for name, layer in self.layers.items():
            change = self.scale * layer.lora_B.float() @ layer.lora_A.float()
            weights[f"{name}.weight"] = (layer.weight.float() + change).to(layer.weight.dtype)
        return weights

    def save_pretrained(self, folder, state_dict=None):
        """Write the adapter as peft reads it."""
        pairs = {name: (layer.lora_A, layer.lora_B) for name, layer in self.layers.items()}
        data.write_adapter(folder, pairs, self.scale * len(next(iter(pairs.values()))[0]), self.base)

def on_rank_0(tensor):
    """A tensor, however spread, whole in host memory for rank 0 alone; all ranks must ask for it."""
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.cpu() if RANK == 0 else None

def all_gather(value):
    """The values that the ranks call this with, in their order."""
    values = [value] * WORLD
    if WORLD > 1:
        distributed.all_gather_object(values, value)
    return values

def join_ranks(config):
    """Under torchrun: meet the other processes."""
    if device_and_dtype(config)[0].startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    kinds = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"  # hours: rank 0 may have to write 100 GB
    distributed.init_process_group(kinds, timeout=timedelta(hours=2))

def shard(model, dtype):
    """Spread a model over the ranks (FSDP2), to compute in `dtype`; gradients are averaged. The root has the tied
    embeddings; the vision tower is called by itself. Inputs aren't cast: rotary angles are fp32."""
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh, visual = init_device_mesh(model.device.type, (WORLD,)), model.model.visual
    for unit in (*visual.blocks, visual, *model.model.language_model.layers, model):
        fully_shard(unit, mesh=mesh, mp_policy=precision)
    return model

@contextmanager
def kept_whole(model):
    """While decoding, ranks keep what the first token gathered, and none waits for another's longer responses."""
    units = [unit for unit in model.modules() if isinstance(unit, FSDPModule) and unit is not model]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
    yield
    for unit in units:
        unit.set_reshard_after_forward(True, recurse=False)
        unit.reshard()

def load_models(config):
    """(policy, Processor, reference, judge, LoRA), None where not used: as named, prepared (the toy's), or kept by the
    run that --resume continues."""
    names = {"start": config.model, "reward_model": config.reward_model, "adapter": config.adapter}
    kept, judge, adapters, reference = Path(config.out, "checkpoint"), None, None, None
    if config.resume:
        names = {name: str(kept / name) if (kept / name).exists() else given for name, given in names.items()}
    elif config.model == "toy" or config.reward_model in TRAINED_HERE and not config.eval_only:
        from reward_model import prepare  # it makes folders like any other
        names |= all_gather(prepare(config) if RANK == 0 else None)[0]

    def keep(name, *made):  # what can't be had again by id
        if names[name] and Path(names[name]).is_dir() and not (config.resume or config.eval_only):
            data.save_folder(kept / name, *made)

    policy, processor = load(names["start"], config)
    keep("start", policy, processor)
    policy.model.visual.requires_grad_(not config.freeze_vision)
    if config.reward_model != "none" and not config.eval_only:
        judge = ThinkingRewardModel(*load(names["reward_model"], config), config.rm_mode, config.rm_prompt)
        keep("reward_model", judge.model, judge.processor)
    if config.lora or config.adapter:
        base = kept / "start" if Path(names["start"]).is_dir() else names["start"]
        adapters = LoRA(policy, config.lora, str(base), names["adapter"])
        keep("adapter", adapters, processor)
    if config.kl_coef and not config.eval_only:
        reference = adapters or copy.deepcopy(policy).requires_grad_(False)
    if WORLD > 1 and not adapters:
        dtype = policy.dtype
        policy, reference = shard(policy.float(), dtype), reference and shard(reference, dtype)
    return policy, processor, reference, judge, adapters

def configure(argv=None):
    """The Config of a command line; a wrong value ends in one line and exit status 2."""
    parser = data.Parser(Config, prog="sophia_min.py", usage="python sophia_min.py [--flag value ...]",
                         description="\n\n".join(__doc__.split("\n\n")[:2]), allow_abbrev=False)
    config, before = parser.settings(argv, TOY)
    if config.reward_model == "base" and config.model != "toy":
        config.reward_model = config.model  # the untrained judge of a real model: that model itself
    for wrong, why in [
        *((not least <= getattr(config, name) < 2 ** 32, f"--{name} must be {least} or more")
          for name, least in LEAST.items()),
        (config.clip_eps >= 1, "--clip_eps must be below 1"),
        (config.min_new_tokens > config.max_new_tokens, "--min_new_tokens must not be above --max_new_tokens"),
        (config.questions_per_step % WORLD, f"--questions_per_step must be a multiple of {WORLD}, the processes"),
        (not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.device), "--device must be auto, cpu, cuda or cuda:N"),
        (config.device[:4] == "cuda" and not torch.cuda.is_available(), "--device: torch sees no CUDA device here"),
        (config.rm_prompt and not Path(config.rm_prompt).is_file(), f"--rm_prompt {config.rm_prompt}: no such file"),
        (config.model == "toy" and config.toy_pixels != 56, "--toy_pixels: the toy model reads 56, a token a cell"),
        (config.data not in data.TOY_SETS and config.reward_model in TRAINED_HERE and not config.eval_only,
         f"--reward_model {config.reward_model} learns from the toy's oracle; for other --data name a folder or an id"),
        (not before and Path(config.out, "config.json").exists(), f"{config.out} holds a run already: go on with "
         f"--resume {config.out}, or choose another --out"),
        (before and Path(config.out).resolve() != Path(before["out"]).resolve(), "--out: a resumed run stays there"),
        (before and any(getattr(config, name) != before[name] for name in KEPT),
         f"--{', --'.join(KEPT)}: a resumed run keeps its own"),
    ]:
        if wrong:
            parser.error(why)
    return config

# -------- the run

def train(config, examples, held_out, about):
    """A whole run: models, self-test, evaluation, GRPO, evaluation, and what it leaves in --out."""
    out, (device, dtype, attention) = Path(config.out), device_and_dtype(config)
    print(f"policy        {config.model}\nreward model  {config.reward_model}\ndata          {about}\n"
          f"computing     {device}, {str(dtype)[6:]}, {attention} attention{f', {WORLD} processes' * (WORLD > 1)}")
    set_seed(config.seed)
    policy, processor, reference, judge, adapters = load_models(config)
    same, results, first = held_out is examples, {}, 1
    examples = data.check_lengths(examples, processor, config)
    held_out = examples if same else data.check_lengths(held_out, processor, config)

    def check_up(when, step=None):
        results[when] = evaluate(policy, processor, held_out, config, f"greedy answers {when} GRPO", step)
        data.write_json(out / "eval.json", results)

    if config.eval_only:
        check_up("before")
        return print(f"{data.table(results)}\nIn {out / 'eval.json'}, under \"before\".")
    offload = config.offload_optimizer if config.offload_optimizer is not None else (
        device.startswith("cuda") and WORLD == 1 and not adapters)
    optimizer = MasterAdamW(policy, config.lr, offload=offload, average=WORLD > 1 and adapters)
    if config.resume:
        state = data.read_checkpoint(config, examples)
        optimizer.restore(state)
        first, results = state["step"] + 1, json.loads((out / "eval.json").read_text())
        print(f"going on      after step {state['step']} of {config.steps}")
    gap = self_test(policy, processor, examples[:4] + [e for e in examples if e.image is None][:1], config)
    print(f"self-test     sampling and training agree to {gap:.1g} nats a token")
    data.write_json(out / "config.json", asdict(config) | {"resume": None})
    if not config.resume:
        check_up("before", None if same else 0)
    bar = progress(range(first, config.steps + 1), desc="GRPO", initial=first - 1, total=config.steps)
    with data.StopAfterStep() as stopping:
        for step in bar:
            chosen = data.questions_of(step, len(examples), config.questions_per_step, config.seed)[RANK::WORLD]
            torch.manual_seed(zlib.crc32(f"{config.seed} {step} {RANK}".encode()))  # a resumed run needs no state
            try:
                line, groups = train_step(step, policy, reference, judge, optimizer, processor,
                                          [examples[i] for i in chosen], config)
            except FloatingPointError as error:
                raise SystemExit(f"step {step}: {error}; questions {', '.join(examples[i].id for i in chosen)}. Try a "
                                 "lower --lr") from error
            data.write_step(out, line, groups, config)
            bar.set_postfix({name: f"{line[name]:.2f}" for name in ("accuracy", "thinking", "gamma", "kl")
                             if line[name] is not None})
            stop = any(all_gather(stopping.asked))  # asked once: a Ctrl-C between saving and stopping loses nothing
            if step % config.save_every == 0 or step == config.steps or stop:
                data.write_checkpoint(config, {"step": step, **optimizer.state()}, examples)
            if stop:
                raise SystemExit(f"stopped after step {step}; go on with --resume {out}")
    check_up("after", None if same else config.steps)
    weights = adapters.merged() if adapters else policy.state_dict()
    data.save_folder(out / "model", policy, processor, {name: on_rank_0(weight) for name, weight in weights.items()})
    if adapters:
        data.save_folder(out / "adapter", adapters, processor)
    data.write_report(out)
    print(f"{data.table(results)}\nLook at {out / 'report.html'}; the trained model is {out / 'model'}" + (
          f", rounded; the adapter itself, {out / 'adapter'}, is exact" if adapters else ""))

def main(argv=None):
    """The command line. Exit status 2 for rows or flags that can't be used, 130 after a second Ctrl-C, else 1."""
    with redirect_stdout(open(os.devnull, "w")) if RANK else nullcontext():
        config = configure(argv)
        try:
            if WORLD > 1:
                join_ranks(config)
            sets = data.load_sets(config)  # rows are checked before the folder is touched
            with data.lock(config.out):
                train(config, *sets)
        except data.DataError as error:
            print(error, file=sys.stderr)
            raise SystemExit(2) from None
        except torch.OutOfMemoryError as error:
            raise SystemExit(f"{str(error).splitlines()[0]} What helps, most first: --lora 16; a smaller "
                             "--micro_batch, --max_pixels, --max_new_tokens, --questions_per_step or --group_size; "
                             "--freeze_vision, --kl_coef 0.") from error
        except KeyboardInterrupt:
            print(f"\nstopped at once; --resume {config.out} goes on, if it has a checkpoint", file=sys.stderr)
            raise SystemExit(130) from None
        finally:
            if distributed.is_initialized():
                distributed.destroy_process_group()

if __name__ == "__main__":
    from sophia_min import main  # so that the module exists once, also for reward_model
    main()
