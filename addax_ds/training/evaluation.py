"""Held-out scores: label words by likelihood, completions by greedy generation.

Evaluation forwards are guests without perturbation: they share gathers like the lanes of a step
and leave no trace in the engine. Examples are dealt to ranks in chunks whose composition does not
depend on the world size, so neither do the scores.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torchmetrics.functional.text import squad
from transformers import PreTrainedTokenizerBase

from addax_ds.config import RunConfig
from addax_ds.data.batches import Batch, collate_choices, collate_prompts, single_token_choices
from addax_ds.data.tasks import Example
from addax_ds.loss import takes_logits_to_keep, token_loss
from addax_ds.optimizer import Addax

# Evaluation forwards that share one gather: more save traffic, each keeps a hidden state.
_LANES = 4


def metric_name(examples: Sequence[Example]) -> str:
    """What `evaluate` reports first: accuracy for label words, exact_match for completions."""
    return "accuracy" if examples[0].choices else "exact_match"


def evaluate(
    optimizer: Addax,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    inputs: frozenset[str],
    max_new_tokens: int,
) -> dict[str, float]:
    """Scores in [0, 1]: accuracy, or exact_match and f1 (a collective; the same on every rank).

    inputs: names that the model's forward takes. max_new_tokens: tokens generated per completion.
    """
    engine = optimizer.engine
    pad_id = tokenizer.pad_token_id

    def place(batch: Batch) -> Batch:
        return {key: value.to(engine.device) for key, value in batch.items() if key in inputs or key == "labels"}

    if examples[0].choices:
        score = _choice_scorer(place, pad_id, config.padding)
    else:
        score = _completion_scorer(place, pad_id, tokenizer, max_new_tokens)

    # Like lengths together, so that little of a chunk is padding.
    order = sorted(range(len(examples)), key=lambda index: (examples[index].length, index))
    size = config.eval_micro_batch
    chunks = [order[begin : begin + size] for begin in range(0, len(order), size)]
    scores = torch.zeros(len(examples), 2, dtype=torch.float64)
    for first in range(0, len(chunks), engine.world_size * _LANES):
        # Every rank runs the same number of forwards; the last round is filled up with repeats.
        numbers = [first + engine.rank + lane * engine.world_size for lane in range(_LANES)]
        runs = [score([examples[index] for index in chunks[min(n, len(chunks) - 1)]]) for n in numbers]
        for number, result in zip(numbers, optimizer.run_guests(runs), strict=True):
            if number < len(chunks):
                scores[chunks[number]] = result
    first_score, second_score = engine.sum(scores).mean(dim=0).tolist()
    if examples[0].choices:
        return {"accuracy": first_score}
    return {"exact_match": first_score, "f1": second_score}


def _choice_scorer(place: Callable[[Batch], Batch], pad_id: int, side: Any) -> Callable:
    """For a chunk, a run that returns float64 [examples, 2]: 1 where the likeliest label word is right."""

    def scorer(chunk: list[Example]) -> Callable[[nn.Module], torch.Tensor]:
        tokens = [single_token_choices(example) for example in chunk]
        single = [choices for choices in tokens if choices is not None]
        answers = torch.tensor([example.answer for example in chunk])

        def run(model: nn.Module) -> torch.Tensor:
            if len(single) == len(chunk):
                # One forward scores every label word where each is one token.
                logits = _last_logits(model, place(collate_prompts(chunk, pad_id)))
                likelihoods = logits.cpu().gather(1, torch.stack(single))
            else:
                # Per token, so that a longer label word is at no disadvantage.
                losses = token_loss(model, place(collate_choices(chunk, pad_id, side)))
                likelihoods = -losses.cpu().view(len(chunk), -1)
            right = (likelihoods.argmax(dim=1) == answers).double()
            return torch.stack((right, right), dim=1)

        return run

    return scorer


def _last_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits after the last position of a left-padded batch: float32 [batch, vocabulary]."""
    if takes_logits_to_keep(model):
        return model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1].float()
    return model(**batch).logits[:, -1].float()


def _completion_scorer(
    place: Callable[[Batch], Batch], pad_id: int, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> Callable:
    """For a chunk, a run that returns float64 [examples, 2]: exact match and F1 of the greedy answer."""

    def scorer(chunk: list[Example]) -> Callable[[nn.Module], torch.Tensor]:
        def run(model: nn.Module) -> torch.Tensor:
            generated = _generate(model, place(collate_prompts(chunk, pad_id)), max_new_tokens)
            scores = []
            for example, row in zip(chunk, generated.tolist(), strict=True):
                if tokenizer.eos_token_id in row:
                    row = row[: row.index(tokenizer.eos_token_id)]
                answer = str(tokenizer.decode(row, skip_special_tokens=True)).strip()
                result = squad(
                    [{"prediction_text": answer, "id": "0"}],
                    [
                        {
                            "answers": {
                                "answer_start": [0] * len(example.references),
                                "text": list(example.references),
                            },
                            "id": "0",
                        }
                    ],
                )
                scores.append([float(result["exact_match"]) / 100, float(result["f1"]) / 100])
            return torch.tensor(scores, dtype=torch.float64)

        return run

    return scorer


def _generate(model: nn.Module, batch: Batch, count: int) -> torch.Tensor:
    """Exactly `count` greedy tokens after each left-padded prompt: int64 [batch, count].

    No early end: every rank must run the same number of forwards.
    """
    mask, cache, generated = batch["attention_mask"], None, []
    step = dict(batch)
    for _ in range(count):
        output = model(**step, past_key_values=cache, use_cache=True)
        cache, token = output.past_key_values, output.logits[:, -1].argmax(dim=-1, keepdim=True)
        generated.append(token)
        mask = torch.cat((mask, torch.ones_like(token)), dim=1)
        step = {"input_ids": token, "attention_mask": mask}
        if "position_ids" in batch:
            step["position_ids"] = mask.sum(dim=1, keepdim=True) - 1
    return torch.cat(generated, dim=1)
