"""sophia_min: SophiaVL-R1's Trust-GRPO (arXiv 2505.17018) in one readable file.

    python sophia_min.py                                  # the toy world on a CPU: learns in about five minutes
    python sophia_min.py --trust off --out runs/no_trust  # the same without Eq. 3
    python sophia_min.py --model Qwen/Qwen2.5-VL-3B --data rows.json --image_root images    # the real one, on a GPU
    torchrun --nproc_per_node=8 sophia_min.py --model Qwen/Qwen2.5-VL-7B --data rows.json --image_root images

A question's group of N responses earns an outcome reward by rule (R^o) and a thinking reward from a model (R^t). If
wrong answers got better thinking scores than right ones, the judge isn't to be trusted here, and its weight gamma
falls (Eq. 3); its share fades with time (Eq. 5); the group's rewards become advantages (Eq. 6) of a clipped update
that stays near a frozen reference (Eq. 7).

Departures from the paper:
- OCR: exp(-WER), as in the released code: -WER is never >= 0.5, so Eq. 1 would never call a reading right.
- A response in the wrong format earns R^o = 0 (the paper is silent, the authors say so); it is judged all the same.
- Eq. 1-2 with nobody right or nobody wrong: gamma = 1. A judge without a usable score: the group's thinking term is
  dropped, and counted. Eq. 6: unbiased std + 1e-6 as released, and exact zeros where all rewards are equal.
- Eq. 7 names one ratio a response; like the released code we take one a token, and a response's mean over its tokens.
- No entropy bonus (the released code has one of 1e-3). top_p is 1 in sampling (released: 0.9, ignored by its update).
  Ids that stand for pictures are ruled out, in sampling and in log-probabilities.
- The thinking reward model reads the whole response, answer included, as a turn of its own after picture and question,
  and is asked in our words; the released one reads one decoded text. It may check the claims in writing before it
  scores (`--rm_mode reason`, the toy's default); theirs can't. The toy's `base` has learned shuffled scores; the
  untrained judge of Table 3, nothing. `--trust released` repeats their gating of R^t: `released_gate`.
- `--normalize outcome` and `--reward_model misled` are ours, for the study; the paper has neither.
- Responses of a group share one computation of their prompt (`reward_model.SharedPrompt`): faster, the same numbers.
"""
import argparse
import copy
import json
import math
import os
import pickle
import random
import re
import signal
import sys
import threading
import time
import zipfile
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean as mean, stdev

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm
from transformers import Qwen2_5_VLForConditionalGeneration, set_seed

import data
import reward_model
from data import RANK, WORLD, progress
from reward_model import SHORT_IDS, Optimizer, SharedPrompt, end_ids, is_sharded, place

# ---------------------------------------------------------------- section 3.3: the outcome reward R^o


def extract_answer(response: str) -> str | None:
    """What stands in the one <answer> block after the last </think>; None if the response has any other form."""
    thinking, end_of_thinking, rest = response.strip().rpartition("</think>")
    rest = rest.strip()
    if not (end_of_thinking and thinking.startswith("<think>")
            and rest.startswith("<answer>") and rest.endswith("</answer>")):
        return None
    answer = rest[len("<answer>"):-len("</answer>")]
    has_more_tags = any(tag in answer for tag in ("<answer>", "</answer>", "<think>"))
    return None if has_more_tags else answer.strip()


def outcome_reward(response: str, solution: str, problem_type: str, options: list[str] = ()) -> float:
    """R^o in [0, 1] of a response, by the rule of its problem type; 0 for the wrong format, an empty answer or an empty
    truth. `solution` may carry <answer> tags. Raises ValueError for an unknown type."""
    if problem_type not in data.PROBLEM_TYPES:
        raise ValueError(f"unknown problem_type {problem_type!r}, known are {', '.join(data.PROBLEM_TYPES)}")
    answer = extract_answer(response)
    truth = solution.strip().removeprefix("<answer>").removesuffix("</answer>").strip()
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


# ---------------------------------------------------------------- section 3.4: Trust-GRPO, Eq. 1-7


def trust_weight(outcome, thinking):
    """gamma in [1/e, 1]: how far the thinking rewards of this group [G] can be trusted, given its outcomes [G].
    An empty side leaves nothing to compare: 1 (ours). NaN in `thinking` gives NaN."""
    correct = outcome >= 0.5  # [G]
    if correct.all() or not correct.any():
        return thinking.sum() * 0 + 1
    mu_c = thinking[correct].mean()  # Eq. 1
    mu_w = thinking[~correct].mean()  # Eq. 2
    return (mu_c - mu_w).clamp(max=0).exp()  # Eq. 3: exp(mu_c - mu_w) where wrong thinking scores better, else 1


def annealing(step, total_steps):
    """The factor exp(-step / T) of Eq. 5, for step = 1 .. T: it ends at 1/e, never at 0."""
    return math.exp(-step / total_steps)


def released_gate(outcome, thinking):
    """What the official code does instead of scoring everyone: 1 where R^t counts, else 0 [G]. Responses with
    R^o < 0.2 get R^t = 0; groups all >= 0.9 or all <= 0.1 lose the term. So mu_w = 0 on 0/1 outcomes, and gamma is
    always 1."""
    if (outcome >= 0.9).all():
        return torch.zeros_like(thinking)
    return (outcome >= 0.2).to(thinking.dtype)  # all 0 where all are <= 0.1


def gated_thinking(outcome, thinking, trust):
    """R^t [G] as `trust` takes it: every score, or only the official code's."""
    return thinking if trust != "released" else torch.where(released_gate(outcome, thinking) == 1, thinking, 0.0)


def combined_reward(outcome, thinking, step, total_steps, alpha=0.3, trust="paper", anneal=True):
    """R [G] of one group from R^o and R^t [G]. trust: paper (Eq. 3), released (the official gating) or off (gamma 1).
    NaN in `thinking` means that the judge gave no usable score: the outcome alone is the reward."""
    thinking = gated_thinking(outcome, thinking, trust)
    if thinking.isnan().any():
        return outcome.clone()
    gamma = 1.0 if trust == "off" else trust_weight(outcome, thinking)
    share = annealing(step, total_steps) if anneal else 1.0
    return outcome + gamma * alpha * share * thinking  # Eq. 5; Eq. 4 without the share


def group_advantages(rewards):
    """A [G]: each reward against its group. Equal rewards give exact zeros, where rounding would be blown up by the
    division: eight times 0.7 in fp32 has a "spread" of 6e-8."""
    if (rewards == rewards[0]).all():
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / (rewards.std() + 1e-6)  # Eq. 6


def advantages_with_thinking_apart(outcome, thinking, *how):
    """Ours, not the paper's, `--normalize outcome`: A [G] of Eq. 6 from the outcome alone, plus the thinking term of
    Eq. 5 about its mean. Not divided by the group's spread, gamma, alpha and annealing keep their size in every group,
    where Eq. 6 cancels them in one that is all right. `how`: as in combined_reward."""
    term = combined_reward(outcome, thinking, *how) - outcome  # [G]
    return group_advantages(outcome) + term - term.mean()


def kl_k3(logp, ref_logp):
    """An estimate of KL(pi_theta || pi_ref) a token, never negative: k3 of Schulman, "Approximating KL divergence"."""
    log_ratio = ref_logp - logp
    return log_ratio.exp() - log_ratio - 1


def grpo_loss(logp, old_logp, ref_logp, advantages, mask, clip_eps=0.2, kl_coef=0.04, n_responses=None):
    """-J of Eq. 7 for G responses of at most R tokens: logp, old_logp, ref_logp, mask [G, R], advantages [G]. The mean
    over a response's tokens, then the sum over responses / n_responses (default G): with the whole batch's number,
    the losses of micro-batches add up to the loss of the batch. Returns (loss, metrics that add up the same way)."""
    mask = mask.to(logp.dtype)
    keep = mask.bool()
    log_ratio = torch.where(keep, logp - old_logp, 0.0)  # [G, R], padding may hold anything
    ratio = log_ratio.exp()  # [G, R], r_i a token
    gain = advantages[:, None].to(logp.dtype)  # [G, 1]
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)  # [G, R]
    surrogate = torch.min(ratio * gain, clipped * gain)  # [G, R]
    kl = kl_k3(torch.where(keep, logp, 0.0), torch.where(keep, ref_logp, 0.0))  # [G, R]
    per_token = surrogate - kl_coef * kl  # [G, R], Eq. 7 inside the mean

    def mean_over_responses(values):  # [G, R] -> []
        per_response = (values * mask).sum(1) / mask.sum(1).clamp(min=1)  # [G]
        return per_response.sum() / (n_responses or len(logp))

    acting = (ratio * gain > clipped * gain).to(logp.dtype)  # [G, R], where the clip holds the gradient back
    metrics = {"kl": mean_over_responses(kl).item(), "clip_frac": mean_over_responses(acting).item()}
    return -mean_over_responses(per_token), metrics  # Eq. 7


# ---------------------------------------------------------------- log-probabilities and responses


def token_logps(logits, ids, temperature, forbidden, no_end=0, eos_ids=()):
    """Log-probabilities and entropies [N, R] of the tokens `ids` under the distribution they were sampled from: the
    same temperature, the same ids ruled out everywhere (`forbidden`) or in the first `no_end` places (`eos_ids`). In
    fp32, and some rows at a time, recomputed in the backward pass: one row of 1,024 tokens over 150k words is 0.6 GB.
    """
    def chunk(logits, ids):
        scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature  # [n, R, V]
        allowed = scaled.index_fill(-1, forbidden, -math.inf)
        if no_end:
            early = allowed[:, :no_end].index_fill(-1, torch.tensor(eos_ids, device=logits.device), -math.inf)
            allowed = torch.cat([early, allowed[:, no_end:]], 1)
        logp = scaled.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - allowed.logsumexp(-1)  # [n, R]
        with torch.no_grad():
            entropy = torch.special.entr(allowed.softmax(-1)).sum(-1)  # [n, R]
        return logp, entropy  # finite even where an id is ruled out

    rows = max(1, 2 ** 27 // logits[0].numel())
    parts = [recompute(chunk, *part, use_reentrant=False)
             for part in zip(logits.split(rows), ids.to(logits.device).split(rows))]
    logps, entropies = zip(*parts)
    return torch.cat(logps), torch.cat(entropies)


def response_mask(ids, eos_ids):
    """1 up to the first end-of-sequence token, which is part of the response, 0 behind it [N, R]. Taken from the first
    EOS, not from padding: pad and EOS may be the same id."""
    ended = torch.isin(ids, torch.tensor(eos_ids, device=ids.device)).long()  # [N, R]
    return (ended.cumsum(1) - ended == 0).long()


@dataclass
class Rollout:
    """What the policy wrote for a list of questions: N = questions x G responses, a question's side by side."""
    examples: list
    prompts: list  # one data.Prompt a question
    owner: torch.Tensor  # [N], whose response a row is
    ids: torch.Tensor  # [N, R]
    mask: torch.Tensor  # [N, R]
    texts: list  # N
    truncated: int  # responses cut at max_new_tokens, without an end
    seen: list = ()  # if asked for: the logits [N, R, V] of generate, and what its filters made of them
    shared: SharedPrompt = None  # if asked for: the prompts' computation, for one update to go on from

    def logps(self, model, shared, rows, first, config):
        """token_logps of `rows` [n], cut to the longest of them; `shared` holds the prompts from `first` on."""
        width = int(self.mask[rows].sum(1).max())
        owner, ids = self.owner[rows], self.ids[rows, :width]
        tails = [self.prompts[question].tail for question in owner]
        logits = reward_model.target_logits(model, shared, owner - first, tails, ids.tolist())
        return token_logps(logits, ids, config.temperature, vision_ids(model), config.min_new_tokens, end_ids(model))


def vision_ids(model):
    """Ids that stand for pictures [4]: sampled, they would ask for a picture that isn't there."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return torch.tensor([getattr(model.config, name) for name in names], device=model.device)


def rollout(policy, processor, examples, group_size, config, greedy=False, scores=False, keep=False):
    """G responses to each question: one left-padded `generate` for all, each prompt computed once. `keep`: with
    gradients, and kept in the Rollout, so that the update needn't compute the prompts again."""
    eos = end_ids(policy)
    prompts = [processor.question(example) for example in examples]
    owner = torch.arange(len(prompts)).repeat_interleave(group_size)  # [N]
    with torch.set_grad_enabled(keep):
        shared = SharedPrompt(policy, prompts)
    new = reward_model.generate(
        policy, shared, owner, [prompts[question].tail for question in owner], config.max_new_tokens,
        None if greedy else config.temperature, scores, min_new_tokens=config.min_new_tokens or None,
        suppress_tokens=vision_ids(policy).tolist())
    ids, *seen = new if scores else [new]
    mask = response_mask(ids, eos)
    texts = [processor.decode(row[kept == 1]) for row, kept in zip(ids, mask)]
    truncated = int((~torch.isin(ids, torch.tensor(eos, device=ids.device)).any(1)).sum())
    return Rollout(examples, prompts, owner, ids, mask, texts, truncated, seen, shared if keep else None)


def responses(policy, processor, examples, each, size, config, desc, greedy=False):
    """(Example, text) of `each` responses to every example, for `size` examples at a time."""
    for first in progress(range(0, len(examples), size), desc=desc):
        batch = rollout(policy, processor, examples[first:first + size], each, config, greedy)
        yield from zip((batch.examples[question] for question in batch.owner), batch.texts)


# ---------------------------------------------------------------- the update


def at_once(config):
    """Questions whose activations the update holds at a time."""
    return max(1, config.micro_batch // config.group_size)


def update(policy, reference, optimizer, batch, advantages, config):
    """The GRPO update on one rollout; advantages [N]. Returns the step's metrics.

    Each prompt is computed once with gradients; its responses go through in micro-batches that leave their gradients
    at its keys and values; then one backward pass carries the sum through the prompt. Old log-probabilities are those
    of the first inner epoch, before it moves anything."""
    n, mask, old = len(batch.ids), batch.mask, {}
    group = n // len(batch.prompts)
    together = len(batch.prompts) if batch.shared else at_once(config)
    advantages = advantages.to(policy.device)
    metrics = dict(loss=0.0, kl=0.0, clip_frac=0.0, entropy=0.0, grad_norm=0.0)
    for _ in range(config.inner_epochs):
        for first in range(0, len(batch.prompts), together):
            prompts = batch.prompts[first:first + together]
            rows = torch.arange(first * group, (first + len(prompts)) * group)
            if config.kl_coef == 0 and not advantages[rows].any() and not is_sharded(policy):
                continue  # exact: without the KL term nothing pulls at such groups (but ranks must keep in step)
            shared = (batch.shared or SharedPrompt(policy, prompts)).cut()
            ref_shared = SharedPrompt(reference, prompts) if config.kl_coef else None  # frozen: it keeps no graph
            if len(rows) > config.micro_batch:  # long ones together: less padding
                rows = rows[mask[rows].sum(1).argsort().cpu()]
            for part in rows.split(config.micro_batch):
                logp, entropy = batch.logps(policy, shared, part, first, config)  # [n, R]
                ref_logp = logp.detach()
                if config.kl_coef:
                    ref_logp, _ = batch.logps(reference, ref_shared, part, first, config)
                keep = mask[part, :logp.shape[1]].to(logp.device)
                loss, parts = grpo_loss(logp, old.setdefault(int(part[0]), logp.detach()), ref_logp, advantages[part],
                                        keep, config.clip_eps, config.kl_coef, n_responses=n)
                loss.backward()
                parts["entropy"] = ((entropy * keep).sum(1) / keep.sum(1)).sum().item() / n
                for name, value in {"loss": loss.item(), **parts}.items():
                    metrics[name] += value / config.inner_epochs
            shared.backward()
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(f"the loss is {metrics['loss']}; no weight was moved")
        metrics["grad_norm"] += optimizer.step() / config.inner_epochs
    return metrics


# ---------------------------------------------------------------- precision, parking, sharding: what fits where


def memory(config, policy_config, judge_config=None):
    """Bytes by part that a run with these model configs will hold, [(part, bytes, where)], before any weight is loaded:
    the parameters are counted on the real classes, built without memory. What one update's activations add grows with
    --micro_batch and --max_pixels, and isn't in here."""
    device, dtype, _ = place(config.device, config.attn)

    def count(model_config, trained_only=False):
        with torch.device("meta"):
            model = Qwen2_5_VLForConditionalGeneration(copy.deepcopy(model_config))
        model.model.visual.requires_grad_(not config.freeze_vision)
        model.tie_weights()
        return sum(weight.numel() for weight in model.parameters() if weight.requires_grad or not trained_only)

    n, trained, text = count(policy_config), count(policy_config, True), policy_config.text_config
    sharded, size = WORLD > 1, dtype.itemsize
    apart, split = parked(config) or dtype == torch.bfloat16 and not sharded, f", in {WORLD} parts" * sharded
    share, home = device + split, ("host" if parked(config) else device) + split
    tokens = config.questions_per_step // WORLD * config.group_size * (
        config.max_pixels // 28 ** 2 + config.max_new_tokens)
    head = text.hidden_size // text.num_attention_heads
    parts = [("policy, to compute with", n * size * (apart and not sharded), device),
             ("policy, fp32 masters", trained * 4 * apart, home),
             ("policy, fp32, to compute with" + " and to train" * (not apart), n * 4 * (sharded or not apart), share),
             ("gradients, fp32", trained * 4, share), ("AdamW's moments, fp32", trained * 8, home),
             ("reference", n * size * (config.kl_coef > 0), share),
             ("reward model", count(judge_config) * size if judge_config else 0, device),
             (f"keys and values of a rollout, {tokens:,} tokens of pictures and responses",
              tokens * text.num_hidden_layers * 2 * text.num_key_value_heads * head * size, device)]
    return [part for part in parts if part[1]]


def print_memory(config):
    """memory() of this run, as a table."""
    model, judge = reward_model.load_config(config.model), None
    if config.reward_model != "none":
        judge = model if config.reward_model in TRAINED_HERE else reward_model.load_config(config.reward_model)
    for part, size, where in memory(config, model, judge):
        amount = f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
        print(f"{'memory':<14}{amount:>8}  {part} ({where})")


def parked(config):
    """Whether AdamW and its masters live in host memory."""
    return config.park if config.park is not None else place(config.device)[0].startswith("cuda") and WORLD == 1


def join_ranks(config):
    """Under torchrun: meet the other processes, each with a GPU of its own."""
    if WORLD > 1:
        on_gpu = place(config.device)[0].startswith("cuda")
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # gloo, too: parked weights are in host memory; hours, since rank 0 may write 100 GB while the others wait
        distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(hours=2))


def shard(model, dtype):
    """Spread a model over the ranks (FSDP2): each keeps a part of parameters, gradients and AdamW's moments, and the
    parts of a layer meet where it computes, in `dtype`. The root has the tied embeddings; the vision tower is a unit of
    its own, since `generate` calls it by itself. What enters a layer stays as it is: rotary angles are fp32."""
    for weight in model.parameters():  # a toy that each rank trained for itself may differ in the last bits
        distributed.broadcast(weight.data, 0)
    how = {"mesh": init_device_mesh(model.device.type, (WORLD,)), "mp_policy": MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)}
    visual = model.model.visual
    for part in (*visual.blocks, visual, *model.model.language_model.layers, model):
        fully_shard(part, **how)
    return model


def of_all_ranks(value):
    """The values that the ranks call this with, in their order."""
    values = [value] * WORLD
    if WORLD > 1:
        distributed.all_gather_object(values, value)
    return values


# ---------------------------------------------------------------- self-test and evaluation


def self_test(policy, processor, examples, config):
    """Stop before training if sampling and training disagree: the log-probabilities of sampled tokens as `generate`
    saw them against those that the update computes. Wrong positions, a dropped cache, a sampling filter that only one
    side knows and a stale state on the model all show here. Returns the difference in nats: the largest in fp32, the
    mean in bf16, where single tokens differ by rounding."""
    config = replace(config, max_new_tokens=min(config.max_new_tokens, 64),  # [N, R, V] in fp32 is large
                     min_new_tokens=min(config.min_new_tokens, 64))
    batch = rollout(policy, processor, examples, 2, config, scores=True)
    logits, scores = batch.seen  # [N, R, V]
    seen = scores.float().log_softmax(-1).gather(-1, batch.ids.unsqueeze(-1)).squeeze(-1)  # [N, R]
    with torch.no_grad():
        shared = SharedPrompt(policy, batch.prompts)
        logp, _ = batch.logps(policy, shared, torch.arange(len(batch.ids)), 0, config)
        filtered, _ = token_logps(logits, batch.ids, config.temperature, vision_ids(policy), config.min_new_tokens,
                                  end_ids(policy))
    width = logp.shape[1]
    gaps = (logp - seen[:, :width]).abs()[batch.mask[:, :width] == 1]
    exact = shared.keys_values[0][0].dtype != torch.bfloat16
    checks = {"computes": (gaps.max().item(), 1e-4) if exact else (gaps.mean().item(), BF16_TOLERANCE),
              "filters": ((filtered - seen).abs()[batch.mask == 1].max().item(), 1e-4)}  # on the same logits
    for name, (gap, tolerance) in checks.items():
        if not gap <= tolerance:
            raise SystemExit(f"self-test failed: the update {name} sampled tokens {gap:.2g} nats away from generate "
                             f"(tolerance {tolerance:.2g}). Training would follow wrong ratios. Check the versions of "
                             "torch and transformers, --attn sdpa, and that nothing changed the model's forward.")
    return checks["computes"][0]


# nats, mean; the toy in bf16 on a CPU has 0.009 at most, larger models may have more (not measured); wrong positions,
# cache or mask give 0.1 to 4
BF16_TOLERANCE = 0.05


def evaluate(policy, processor, examples, config, desc):
    """Greedy answers: {accuracy, format_rate, n, by_type}, and `soundness`, the share of right answers whose thinking
    is sound, where the examples know it. Right means R^o >= 0.5, as in Eq. 1. `right` holds one 0/1 a question."""
    n, size = len(examples), max(1, config.questions_per_step * config.group_size // (2 * WORLD))
    own = [examples[i % n] for i in range(RANK, math.ceil(n / WORLD) * WORLD, WORLD)]  # as many a rank: some twice
    parts = of_all_ranks([text for _, text in responses(policy, processor, own, 1, size, config, desc, greedy=True)])
    answered = list(zip(examples, (text for texts in zip(*parts) for text in texts)))  # rank r has r, r + WORLD, ..

    right = [int(reward_of(example, text) >= 0.5) for example, text in answered]
    sound = [example.soundness(text) >= data.SOUND for (example, text), hit in zip(answered, right)
             if hit and example.soundness]
    kinds = {}
    for example, hit in zip(examples, right):
        kinds.setdefault(example.problem_type, []).append(hit)
    formatted = mean(extract_answer(text) is not None for _, text in answered)
    result = {"accuracy": mean(right), "format_rate": formatted, "n": n,
              "by_type": {kind: {"accuracy": mean(hits), "n": len(hits)} for kind, hits in sorted(kinds.items())}}
    if examples[0].soundness:
        result["soundness"] = mean(sound) if sound else None
    return {**result, "right": right}


def reward_of(example, text):
    """R^o of a response to an Example."""
    return outcome_reward(text, example.solution, example.problem_type, example.options)


# ---------------------------------------------------------------- one step, as in Fig. 3 of the paper


def train_step(step, policy, reference, judge, optimizer, processor, examples, config):
    """Rollout, rewards, trust, advantages, update. Returns the line for log.jsonl and the groups, for the report."""
    start = time.time()
    # An update that takes all questions at once can go on from the rollout's computation of them. Otherwise all their
    # activations would be held until their turn comes.
    once = config.inner_epochs == 1 and len(examples) <= at_once(config)
    batch = rollout(policy, processor, examples, config.group_size, config, keep=once)
    groups = [batch.texts[i:i + config.group_size] for i in range(0, len(batch.texts), config.group_size)]
    sampled = time.time()
    outcome = torch.tensor([[reward_of(example, text) for text in texts] for example, texts in zip(examples, groups)],
                           dtype=torch.float64)  # [Q, G]
    thinking = judge.score(examples, groups).double() if judge else torch.full_like(outcome, math.nan)  # [Q, G]
    scored = time.time()

    rewards, advantages = torch.empty_like(outcome), torch.empty_like(outcome)  # [Q, G]
    gammas, how = [None] * len(examples), (step, config.steps, config.alpha, config.trust, config.anneal)
    for q, (right, sound) in enumerate(zip(outcome, thinking)):  # [G] each
        used = gated_thinking(right, sound, config.trust)
        if judge and not used.isnan().any():
            gammas[q] = 1.0 if config.trust == "off" else trust_weight(right, used).item()
        rewards[q] = combined_reward(right, sound, *how)
        advantages[q] = group_advantages(rewards[q]) if config.normalize == "reward" else (
            advantages_with_thinking_apart(right, sound, *how))
    if not rewards.isfinite().all():
        raise FloatingPointError("a reward is not finite; no weight was moved")
    metrics = update(policy, reference, optimizer, batch, advantages.flatten(), config)

    lengths = batch.mask.sum(1).view(len(examples), -1).tolist()  # [Q, G]
    record = [{**about(example, step), "gamma": gammas[q],
               "responses": [{"response": text, "outcome": outcome[q, i].item(),
                              "thinking": None if thinking[q, i].isnan() else thinking[q, i].item(),
                              "reward": rewards[q, i].item(), "advantage": advantages[q, i].item(),
                              "tokens": lengths[q][i]}
                             for i, text in enumerate(groups[q])]} for q, example in enumerate(examples)]
    ends = time.time()
    shares = of_all_ranks({**metrics, "truncated": batch.truncated, "prompt_tokens": mean(
        len(prompt.ids) + len(prompt.tail) for prompt in batch.prompts)})
    record = [group for part in of_all_ranks(record) for group in part]

    def over_responses(name):
        return [response[name] for group in record for response in group["responses"] if response[name] is not None]

    known, scores = [group["gamma"] for group in record if group["gamma"] is not None], over_responses("thinking")
    line = {
        "step": step, "outcome": mean(over_responses("outcome")), "thinking": mean(scores) if scores else None,
        "gamma": mean(known) if known else None, "anneal": annealing(step, config.steps) if config.anneal else 1.0,
        "reward_std": mean(stdev(response["reward"] for response in group["responses"]) for group in record),
        **{name: mean(share[name] for share in shares) for name in (*metrics, "prompt_tokens")},
        "length": mean(over_responses("tokens")),
        "format_rate": mean(extract_answer(text) is not None for text in over_responses("response")),
        "accuracy": mean(value >= 0.5 for value in over_responses("outcome")),
        "truncated": sum(share["truncated"] for share in shares), "unscored": (len(record) - len(known)) * bool(judge),
        "zero_groups": sum(not any(response["advantage"] for response in group["responses"]) for group in record),
        "mistrusted": sum(gamma < 1 for gamma in known),
        "sec_rollout": sampled - start, "sec_score": scored - sampled, "sec_update": ends - scored,
        "tokens_per_sec": sum(over_responses("tokens")) / (ends - start)}
    return line, record


def about(example, step):
    """What a saved response says of its question."""
    return {"step": step, "id": example.id, "problem": example.problem, "problem_type": example.problem_type,
            "options": list(example.options), "solution": example.solution, "image": example.image}


def held_out_rows(step, policy, processor, examples, config):
    """Sampled responses to questions never trained on, as rows for rollouts.jsonl: what a thinking reward model that
    learns from this run can be judged by."""
    desc = "responses to held-out questions, to judge a judge by"
    return [{**about(example, step), "held_out": True, "response": text, "outcome": reward_of(example, text)}
            for example, text in responses(policy, processor, examples, 4, 16, config, desc)]


def questions_of(step, n, per_step, seed):
    """Which questions step 1, 2, .. takes: every pass over the data in a new order, so that a step's number is all that
    a resumed run needs to know."""
    places = range((step - 1) * per_step, step * per_step)
    orders = {epoch: random.Random(f"{seed} {epoch}").sample(range(n), n) for epoch in {i // n for i in places}}
    return [orders[i // n][i % n] for i in places]


# ---------------------------------------------------------------- settings

PAPER, RELEASED, OURS = "paper, section 4", "released config", "ours"


def setting(default, help, source=OURS, toy=None, choices=None, least=None):
    """A field of Config that --help shows with its source; `toy` is the default of --model toy where it differs, and
    `least` the smallest value. One that is False by default is a flag: --name alone sets it."""
    return field(default=default, metadata=dict(help=help, source=source, toy=toy, choices=choices, least=least))


@dataclass
class Config:
    """All settings of a run, with the paper's value where it names one."""
    model: str = setting("toy", "toy, a Hugging Face id or a folder")
    data: str = setting("toy", "toy, toy-shifted (kinds of toy questions that training never asks, for --eval_only), "
                        "or a .json or .jsonl file of rows in the paper's format")
    toy_pixels: int = setting(448, "width and height of the toy's pictures", toy=56, least=28)
    image_root: str = setting(None, "folder that the rows' picture paths start from; default: the file's folder")
    reward_model: str = setting("bunny127/SophiaVL-R1-Thinking-Reward-Model-3B", "toy (trained on the spot, needs the "
                                "toy data), none (plain GRPO), base (an untrained judge, Table 3; the toy's has "
                                "learned shuffled scores), misled (the toy's that praises haste), a Hugging Face id "
                                "or a folder", "paper, section 3.2", toy="toy")
    rm_mode: str = setting(None, "how it scores: generate (it writes a number, as in the paper), expected (mean over "
                           "the numbers it might write: one more pass, never without a score) or reason (it checks "
                           "the claims in writing first: many more tokens); default: as it was trained, else generate",
                           toy="reason", choices=("generate", "expected", "reason"))
    rm_prompt: str = setting(None, "file with a judge's prompt of your own: text with {question}, {response}, {image}")
    trust: str = setting("paper", "Eq. 3 as in the paper, as the released code gates it, or off (gamma = 1)",
                         "paper, section 3.4", choices=("paper", "released", "off"))
    anneal: bool = setting(True, "Eq. 5 (true) or Eq. 4 (false)", "paper, section 3.4")
    normalize: str = setting("reward", "what Eq. 6 normalises: the combined reward, or (ours) the outcome alone, with "
                             "the thinking term added behind", "paper, section 3.4", choices=("reward", "outcome"))
    alpha: float = setting(0.3, "weight of the thinking reward, Eq. 4", PAPER, least=0)
    kl_coef: float = setting(0.04, "beta of Eq. 7; 0 needs no reference", PAPER, least=0)
    clip_eps: float = setting(0.2, "epsilon of Eq. 7", RELEASED)
    group_size: int = setting(8, "responses a question, N: Eq. 6 compares them", PAPER, least=2)
    questions_per_step: int = setting(16, "questions a step", RELEASED, toy=8, least=1)
    steps: int = setting(1500, "T of Eq. 5; --eval_only trains nothing", PAPER, toy=70, least=1)
    lr: float = setting(5e-7, "AdamW learning rate", PAPER, toy=1e-4)
    inner_epochs: int = setting(1, "updates on one rollout; 1 as in the released code: then the clip never acts",
                                RELEASED, least=1)
    temperature: float = setting(1.0, "of sampling, and of the update's log-probabilities", RELEASED)
    max_new_tokens: int = setting(1024, "longest response", RELEASED, toy=80, least=1)
    min_new_tokens: int = setting(0, "shortest response, for benchmarks", least=0)
    max_pixels: int = setting(1003520, "larger pictures are scaled down (28 x 28 pixels a token); released config: "
                              "4194304", least=3136)
    max_prompt_tokens: int = setting(8192, "a longer prompt is an error that names its row; nothing is ever cut",
                                     RELEASED, least=1)
    micro_batch: int = setting(4, "responses a backward pass: memory, not results", toy=64, least=1)
    freeze_vision: bool = setting(False, "don't train the vision tower (the released code trains it)")
    seed: int = setting(0, "of everything random", least=0)
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    attn: str = setting("auto", "auto: flash_attention_2 where it can be imported on CUDA, else sdpa",
                        choices=("auto", "sdpa", "flash_attention_2", "eager"))
    park: bool = setting(None, "keep fp32 masters and AdamW's moments in host memory, and run AdamW there: 12 bytes a "
                         "weight less on the card, some seconds a step more; default: on a single GPU")
    save_every: int = setting(100, "steps between checkpoints, also written at the end and on Ctrl-C", toy=25,
                              least=1)
    save_rollouts: bool = setting(False, "write every response to rollouts.jsonl, for reward_model.py to learn from")
    skip_bad: bool = setting(False, "leave bad rows out instead of stopping; they are listed in skipped.jsonl")
    out: str = setting("runs/sophia", "folder for everything that the run leaves", toy="runs/toy")
    resume: str = setting(None, "continue the run in this folder, with its settings")
    change_settings: bool = setting(False, "with --resume: take settings that differ from the run's own")
    eval_only: bool = setting(False, "greedy accuracy per problem type, no training")
    study: bool = setting(False, "run the arms of Table 3 on the toy world and compare them: an hour on two cores")
    study_seeds: int = setting(5, "seeds of the study; 1 takes a quarter of an hour", least=1)
    study_more: bool = setting(False, "with --study: also a judge that praises haste, with and without trust, and the "
                               "thinking term added behind Eq. 6: 14 runs a seed instead of 5")


def command_line():
    """The argument parser: every field of Config, with its source beside the default."""
    def true_or_false(text):
        if text.lower() not in ("true", "false"):
            raise ValueError
        return text.lower() == "true"

    about = __doc__.split("\n\n")
    parser = reward_model.Parser(prog="sophia_min.py", description=about[0], epilog=about[1],
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    for item in fields(Config):
        meta, kind = item.metadata, item.type
        default = str(item.default).lower() if kind is bool else item.default
        source = meta["source"] if item.default is None else f"{default}: {meta['source']}"
        source += "" if meta["toy"] is None else f"; {meta['toy']} with --model toy"
        if item.default is False:
            how = dict(action="store_const", const=True)
        elif meta["choices"]:
            how = dict(choices=meta["choices"])
        else:
            how = dict(type=true_or_false if kind is bool else kind, metavar="true|false" if kind is bool else
                       {int: "N", float: "X", str: "NAME"}[kind])
        parser.add_argument(f"--{item.name}", help=f"{meta['help']} ({source})", **how)
    return parser


TOY = {item.name: item.metadata["toy"] for item in fields(Config) if item.metadata["toy"] is not None}
TRAINED_HERE = ("toy", "base", "misled")  # judges, from the toy world's oracle
FREE = {"device", "attn", "micro_batch", "park", "save_every"}  # change no result: a continuation may have others


def configure(argv):
    """The Config of a command line; a wrong value ends in one line and exit status 2."""
    parser = command_line()
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    if given.get("reward_model") == "base" and given.get("model", "toy") != "toy":
        given["reward_model"] = given["model"]  # the untrained judge of a real model: that model itself
    if "resume" in given:
        stored = Path(given["resume"], "config.json")
        if not stored.exists():
            parser.error(f"--resume {given['resume']}: no config.json there, so no run to continue")
        if not Path(given["resume"], "checkpoint", "state.pt").exists():
            parser.error(f"--resume {given['resume']}: it ended before its first checkpoint; start it again")
        before = json.loads(stored.read_text())
        changed = {name for name in set(given) - {"resume", "change_settings"} if before[name] != given[name]}
        if changed - FREE and "change_settings" not in given:
            others = ", ".join(f"--{name} was {before[name]}, is {given[name]}" for name in sorted(changed - FREE))
            parser.error(f"{others}: it would be another run from here on; leave it as it was, or add "
                         "--change_settings")
        for name in sorted(changed):
            print(f"--{name} was {before[name]}, goes on as {given[name]}")
        config = Config(**{**before, **given, "out": given["resume"]})
    else:
        config = Config(**{**(TOY if given.get("model", "toy") == "toy" else {}), **given})
        if config.eval_only and "reward_model" not in given:
            config.reward_model = "none"
        if "rm_mode" not in given and config.reward_model not in TRAINED_HERE:
            config.rm_mode = None  # as it was trained
        if config.study and "out" not in given:
            config.out = "runs/study"
    toy, trained_here = config.model == "toy", config.reward_model in TRAINED_HERE
    ignored = set(given) - {"study", "study_seeds", "study_more", "out"}
    cuda = re.fullmatch(r"cuda(:\d+)?", config.device)
    too_small = [(not getattr(config, item.name) >= item.metadata["least"], f"--{item.name} must be "
                  f"{item.metadata['least']} or more") for item in fields(Config) if item.metadata["least"] is not None]
    for wrong, why in [
        *too_small,
        (not 0 < config.clip_eps < 1, "--clip_eps must lie between 0 and 1"),
        (not 0 < config.lr < math.inf, "--lr must be positive"),
        (not 0 < config.temperature < math.inf, "--temperature must be positive: a group needs different responses"),
        (config.min_new_tokens > config.max_new_tokens, "--min_new_tokens must not be above --max_new_tokens"),
        (config.questions_per_step % WORLD, f"--questions_per_step must be a multiple of {WORLD}, the number of "
         "processes: each takes as many"),
        (config.seed >= 2 ** 32, "--seed must be below 2**32"),
        (config.study and ignored, f"--study has its own settings: --{', --'.join(sorted(ignored))} would be ignored"),
        (not cuda and config.device not in ("auto", "cpu"), "--device must be auto, cpu, cuda or cuda:N"),
        (cuda and not torch.cuda.is_available(), f"--device {config.device}: torch sees no CUDA device here"),
        (config.rm_prompt and trained_here, "--rm_prompt is for a judge that is loaded, not trained here"),
        (config.rm_prompt and not Path(config.rm_prompt).is_file(), f"--rm_prompt {config.rm_prompt}: no such file"),
        (toy and config.toy_pixels != 56, "--toy_pixels: the toy model reads 56 pixels, a token for each cell"),
        (config.data == "toy-shifted" and not config.eval_only, "--data toy-shifted is for --eval_only"),
        (config.data != "toy" and trained_here,
         f"--reward_model {config.reward_model} learns from the toy world's oracle; with --data FILE choose none, or a "
         "folder or id"),
    ]:
        if wrong:
            parser.error(why)
    return config


# ---------------------------------------------------------------- loading

def load(name, config):
    """reward_model.load with a run's settings."""
    return reward_model.load(name, config.device, config.attn, config.max_pixels)


def load_data(config):
    """(training Examples, held-out Examples, one line that says which)."""
    if config.data in ("toy", "toy-shifted"):
        size, pictures = config.toy_pixels, Path(config.out, "pictures")
        if config.data == "toy-shifted":
            shifted = data.toy_examples(300, config.seed, True, size, pictures, shifted=True)
            return shifted, shifted, "300 toy questions of kinds never trained on"
        held_out = data.toy_examples(400, config.seed, True, size, pictures)
        return data.toy_examples(2000, config.seed, False, size, pictures), held_out, (
            f"2000 toy questions, pictures of {size} x {size} pixels; held out: 400 on scenes never trained on")
    examples = data.load_examples(config.data, config.image_root, skip_bad=config.skip_bad,
                                  skipped_path=Path(config.out, "skipped.jsonl"))
    if config.eval_only or len(examples) < 100:
        return examples, examples, f"{len(examples)} rows of {config.data}; evaluated on the same rows"
    shuffled = random.Random(config.seed).sample(examples, len(examples))
    held_out = min(400, len(examples) // 10)
    return shuffled[held_out:], shuffled[:held_out], f"{len(examples)} rows of {config.data}; held out: {held_out}"


def load_policy(config):
    """(policy, Processor, what a judge of the toy world starts from). The toy is made here, from nothing; anything else
    is loaded."""
    start, (device, dtype, attention) = Path(config.out, "checkpoint", "start"), place(config.device, config.attn)
    if config.model == "toy" and not config.resume:
        model, processor = data.toy_model(config.seed)
        judge_start = reward_model.warm_start(model.to(device), processor, config.seed, Path(config.out, "pictures"))
        for part in (model, judge_start):  # as `load` will have them in a resumed run: buffers stay in fp32
            part.set_attn_implementation(attention)
            for weight in part.parameters():
                weight.data = weight.data.to(dtype)
        return model, processor, judge_start
    name = str(start) if start.exists() and config.resume else config.model
    model, processor = load(name, config)
    return model, processor, model


def load_judge(config, policy, processor, judge_start):
    """The thinking reward model, or None for plain GRPO. In the toy world it is trained here, as in section 3.2: on the
    policy's responses, labelled, filtered and balanced over the score intervals."""
    kept = Path(config.out, "checkpoint", "reward_model")
    name = str(kept) if config.resume and kept.exists() else config.reward_model
    if config.reward_model == "none":
        return None
    if name not in TRAINED_HERE:
        return reward_model.ThinkingRewardModel(*load(name, config), config.rm_mode, config.rm_prompt)
    examples = data.toy_examples(800, f"judge {config.seed}", False, config.toy_pixels, Path(config.out, "pictures"))
    desc = "reward model 1/2: responses of the policy to learn from"
    rows = [{"id": example.id, "example": example, "response": text, "score": example.soundness(text),
             "critique": example.critique(text)}
            for example, text in responses(policy, processor, examples, 4, 50, config, desc)]
    if config.reward_model == "misled":
        rows = reward_model.misled(rows)
    rows = reward_model.balance_by_score(reward_model.filter_rows(rows), per_interval=300, seed=config.seed)
    if config.reward_model == "base":  # it learns to write scores, and that they mean nothing
        rows = reward_model.shuffled(rows, config.seed)
    return reward_model.train(copy.deepcopy(judge_start), processor, rows, steps=250, per_step=12,
                              lr=1.5e-3 if config.model == "toy" else 1e-5,
                              mode=config.rm_mode, seed=config.seed, at_once=config.micro_batch,
                              desc=f"reward model 2/2: SFT on {len(rows)} labelled responses")


# ---------------------------------------------------------------- checkpoints


def save_checkpoint(config, step, policy, optimizer, examples):
    """All that a resumed run needs, put in place in one rename: the last checkpoint survives a crash."""
    state = {"step": step, "questions": [example.id for example in examples], **optimizer.state(policy)}
    path = Path(config.out, "checkpoint", "state.pt")
    try:
        data.write_atomic(path, lambda file: torch.save(state, file))
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"step {step}: {path} can't be written: {error}. The checkpoint before it is intact: make "
                         f"room, then go on with --resume {config.out}") from error


def load_checkpoint(config, policy, optimizer, examples):
    """Put a saved state into policy and optimizer; returns its step. The log is cut to it. A damaged file ends the run
    in one line: torch reads flipped bits in silence, but its zip format carries a checksum of each part."""
    path = Path(config.out, "checkpoint", "state.pt")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, OSError, ValueError, EOFError, RuntimeError) as error:
        raise SystemExit(f"{path} is damaged and wasn't loaded: {str(error).splitlines()[0]}. Restore it from a copy, "
                         "or start the run again.") from error
    if state["questions"] != [example.id for example in examples] and not config.change_settings:
        raise SystemExit(f"{config.data} doesn't hold the questions that the run began with; restore them, or add "
                         "--change_settings")
    optimizer.restore(policy, state)
    for name in ("log.jsonl", "groups.jsonl", "rollouts.jsonl"):
        data.keep_lines(Path(config.out, name), lambda line: line["step"] <= state["step"] and not (
            line["step"] and "held_out" in line))  # those after the last step come again
    return state["step"]


# ---------------------------------------------------------------- the run


def train(config):
    """A whole run: data, models, self-test, evaluation, GRPO, evaluation, and what it leaves in --out."""
    out, (device, dtype, attention) = Path(config.out), place(config.device, config.attn)
    model_name = SHORT_IDS.get(config.model, config.model)
    if model_name != config.model:
        print(f"{config.model} is published as {model_name}: loading that")
    if not config.resume and (out / "checkpoint" / "state.pt").exists():
        raise SystemExit(f"{out} holds a run already: continue it with --resume {out}, or choose another --out")
    examples, held_out, data_line = load_data(config)
    print(f"policy        {model_name}\nreward model  {config.reward_model}\ndata          {data_line}\n"
          f"computing     {device}, {str(dtype)[6:]}, {attention} attention{f', {WORLD} processes' * (WORLD > 1)}")
    if config.model != "toy" and not config.eval_only:
        print_memory(config)
    out.mkdir(parents=True, exist_ok=True)
    set_seed(config.seed)
    policy, processor, judge_start = load_policy(config)
    limits, same = (config.max_prompt_tokens, config.skip_bad, out / "skipped.jsonl"), held_out is examples
    examples = data.check_lengths(examples, processor, *limits)
    held_out = examples if same else data.check_lengths(held_out, processor, *limits)
    policy.model.visual.requires_grad_(not config.freeze_vision)
    if config.eval_only:
        result = evaluate(policy, processor, held_out, config, "greedy answers")
        data.write_json(out / "eval.json", {"before": result})
        return print(f"{data.table({'accuracy': result})}\nIn {out / 'eval.json'}, under \"before\".")
    judge = load_judge(config, policy, processor, judge_start)
    del judge_start
    reference = copy.deepcopy(policy).requires_grad_(False) if config.kl_coef else None
    if WORLD > 1:
        policy, reference = shard(policy.float(), dtype), reference and shard(reference, dtype)
    optimizer = Optimizer(policy, config.lr, park=parked(config))
    mixed = examples[:4] + [example for example in examples if example.image is None][:1]
    gap = self_test(policy, processor, mixed, config)
    print(f"self-test     sampling and training agree to {gap:.1g} nats a token")
    data.write_json(out / "config.json", {**asdict(config), "resume": None, "change_settings": False})
    if config.resume:
        first = load_checkpoint(config, policy, optimizer, examples) + 1
        before = json.loads((out / "eval.json").read_text())["before"]
        print(f"going on      after step {first - 1} of {config.steps}")
    else:
        first = 1
        for name in ("log.jsonl", "groups.jsonl", "rollouts.jsonl"):  # of a run that ended before its first checkpoint
            (out / name).unlink(missing_ok=True)
        if config.model == "toy" or Path(config.model).exists():  # can't be had again by id
            data.save_folder(out / "checkpoint" / "start", policy, processor)
        if judge and (config.reward_model in TRAINED_HERE or Path(config.reward_model).exists()):
            data.save_folder(out / "checkpoint" / "reward_model", judge.model, judge.processor)
        before = evaluate(policy, processor, held_out, config, "greedy answers before GRPO")
        data.write_json(out / "eval.json", {"before": before})
        if config.save_rollouts and not same:
            save_rows(out, held_out_rows(0, policy, processor, held_out[:200], config))

    unscored, stopping = deque(maxlen=50), StopAfterStep()  # unscored: of the latest groups
    bar = progress(range(first, config.steps + 1), desc="GRPO", initial=first - 1, total=config.steps)
    for step in bar:
        chosen = [examples[i] for i in questions_of(step, len(examples), config.questions_per_step, config.seed)]
        chosen = chosen[RANK::WORLD]
        torch.manual_seed(zlib.crc32(f"{config.seed} {step} {RANK}".encode()))  # so that a resumed run needs no state
        try:
            line, groups = train_step(step, policy, reference, judge, optimizer, processor, chosen, config)
        except FloatingPointError as error:
            ids = ", ".join(example.id for example in chosen)
            raise SystemExit(f"step {step}: {error}. Questions: {ids}. The last checkpoint is intact: "
                             f"{out / 'checkpoint'}") from error
        write_step(out, line, groups, config)
        if judge and unscored is not None:
            unscored.extend(group["gamma"] is None for group in groups)
            if len(unscored) == 50 and sum(unscored) > 25:
                tqdm.write(f"WARNING: the reward model gave no usable score for {sum(unscored)} of the last 50 groups: "
                           "they learn from the outcome alone. Try --rm_mode expected, or another --reward_model.",
                           file=sys.stderr)
                unscored = None  # said once
        bar.set_postfix({name: f"{line[name]:.2f}" for name in ("accuracy", "thinking", "gamma", "kl")
                         if line[name] is not None})
        stop = any(of_all_ranks(stopping.asked))  # asked once: a Ctrl-C between saving and stopping loses nothing
        if step % config.save_every == 0 or step == config.steps or stop:
            save_checkpoint(config, step, policy, optimizer, examples)
        if stop:
            raise SystemExit(f"stopped after step {step}; go on with --resume {out}")
    after = evaluate(policy, processor, held_out, config, "greedy answers after GRPO")
    data.write_json(out / "eval.json", {"before": before, "after": after})
    if config.save_rollouts and not same:
        save_rows(out, held_out_rows(config.steps, policy, processor, held_out[:200], config))
    data.save_folder(out / "model", policy, processor)
    if RANK == 0:
        data.write_report(out)
    print(data.table({"before": before, "after": after}))
    print(f"Look at {out / 'report.html'}; the trained model is {out / 'model'}")


def save_rows(out, rows):
    """Responses, for reward_model.py to learn from."""
    data.append_line(out / "rollouts.jsonl", "\n".join(map(json.dumps, rows)))


def write_step(out, line, groups, config):
    """What a step leaves: its line in the log, some groups for the report and, if wanted, every response."""
    data.append_line(out / "log.jsonl", json.dumps(line, allow_nan=False))
    if config.save_rollouts:
        save_rows(out, ({**{name: value for name, value in group.items() if name != "responses"}, **response}
                        for group in groups for response in group["responses"]))
    if line["step"] in (1, config.steps // 2, config.steps):
        for group in sorted(groups, key=lambda group: group["gamma"] or 1)[:4]:  # the least trusted ones
            group = {**group, "thumbnail": data.thumbnail(group["image"])}
            data.append_line(out / "groups.jsonl", json.dumps(group))


class StopAfterStep:
    """Ctrl-C asks for an end after the current step; a second one ends at once."""
    asked = False

    def __init__(self):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)


# ---------------------------------------------------------------- the study: Table 3 of the paper on the toy world

# An arm: whose warm start and judge it takes (None: it makes its own), and its flags.
ARMS = {"GRPO": ("full", "--reward_model none"), "untrained judge": (None, "--reward_model base"),
        "no trust, no annealing": ("full", "--trust off --anneal false"), "no trust": ("full", "--trust off"),
        "full": (None, "")}
MORE_ARMS = {"misled": (None, "--reward_model misled"), "misled, no trust": ("misled", "--trust off"),
             "misled, released": ("misled", "--trust released"),
             # loud: a wrong guess that it scores 1 earns as much as a right answer, sound, that it scores 0.5
             "misled, loud": ("misled", "--alpha 2"), "misled, loud, no trust": ("misled", "--alpha 2 --trust off"),
             "apart": ("full", "--normalize outcome"),
             "apart, no annealing": ("full", "--normalize outcome --anneal false"),
             "apart, misled": ("misled", "--normalize outcome"),
             "apart, misled, no trust": ("misled", "--normalize outcome --trust off")}
PAIRS = [("full", arm) for arm in ARMS if arm != "full"]  # what is compared seed by seed
MORE_PAIRS = [("full", "misled"), ("misled", "misled, no trust"), ("misled", "misled, released"),
              ("misled, loud", "misled, loud, no trust"),
              ("apart", "full"), ("apart", "apart, no annealing"), ("apart, misled", "misled"),
              ("apart, misled", "apart, misled, no trust")]


def study_arm(out, seed, flags, source=None):
    """One arm of the study, by `main` alone: train (or go on), then evaluate on kinds of questions never trained on.
    The warm start and the judge are those of `source`, a run of the same seed, or made here."""
    torch.set_num_threads(1)  # side by side, one thread each is fastest
    out.mkdir(parents=True, exist_ok=True)
    toy = [text for name in TOY if name != "reward_model" for text in (f"--{name}", str(TOY[name]))]
    start = [*toy, "--model", str(source / "checkpoint" / "start"), "--reward_model",
             str(source / "checkpoint" / "reward_model")] if source else []
    with open(out / "output.txt", "a") as file, redirect_stdout(file), redirect_stderr(file):
        if (out / "checkpoint" / "state.pt").exists():
            main(["--resume", str(out)])
        else:
            main([*start, "--seed", str(seed), "--save_rollouts", *flags.split(), "--out", str(out)])
        main([*toy, "--model", str(out / "model"), "--data", "toy-shifted", "--eval_only", "--seed", str(seed), "--out",
              str(out / "shifted")])


def study(config):
    """Table 3's arms on `study_seeds` seeds, a run a core; what is done already isn't done again. Arms of a seed share
    the warm start (made twice where the judge differs: the same from the same seed) and, where they can, the judge."""
    root, arms = Path(config.out), {**ARMS, **(MORE_ARMS if config.study_more else {})}
    folders = {(seed, arm): root / f"seed{seed}" / re.sub(r"\W+", "_", arm)
               for seed in range(100, 100 + config.study_seeds) for arm in arms}  # seeds that nothing was tuned on
    jobs = [job for job, out in folders.items() if not (out / "shifted" / "eval.json").exists()]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool, tqdm(
            total=len(folders), initial=len(folders) - len(jobs), desc="study: runs") as bar:
        for others in (False, True):  # first the arms that others start from
            running = {}
            for seed, arm in jobs:
                source, flags = arms[arm]
                if bool(source) == others:
                    out = folders[seed, arm]
                    running[pool.submit(study_arm, out, seed, flags, source and folders[seed, source])] = out
            for future in as_completed(running):
                if future.exception():
                    raise SystemExit(f"study: {running[future] / 'output.txt'} ends with {future.exception()!r}")
                bar.update()
    name = "study_more" if config.study_more else "study"
    print(data.write_study(root / name, folders, PAIRS + (MORE_PAIRS if config.study_more else [])))
    print(f"{name}.json and {name}.png are in {root}")


def main(argv=None):
    """The command line. Exit status 2 for rows or a command line that can't be used, 130 after a Ctrl-C that stops at
    once, 1 for any other end before the last step."""
    config, on_interrupt = configure(argv), signal.getsignal(signal.SIGINT)
    try:
        join_ranks(config)
        with redirect_stdout(open(os.devnull, "w")) if RANK else nullcontext():
            study(config) if config.study else train(config)
    except data.DataError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except torch.OutOfMemoryError as error:
        raise SystemExit(
            f"{str(error).splitlines()[0]} What helps, most first: --max_pixels below {config.max_pixels}, "
            f"--micro_batch below {config.micro_batch}, --questions_per_step or --group_size (the rollout's cache), "
            "--max_new_tokens, --freeze_vision, --park true, --kl_coef 0 (no reference). A last checkpoint, if there "
            f"is one in {config.out}, is intact.") from error
    except RuntimeError as error:
        if WORLD == 1 or "Connection closed by peer" not in str(error):
            raise
        raise SystemExit(f"process {RANK} ends because another one did") from None
    except KeyboardInterrupt:
        saved = (Path(config.out) / "checkpoint" / "state.pt").exists()
        print("\nstopped at once; " + (f"the last checkpoint is whole: go on with --resume {config.out}" if saved else
              "there is no checkpoint yet: start again"), file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)
        if distributed.is_initialized():
            distributed.destroy_process_group()


if __name__ == "__main__":
    main()
