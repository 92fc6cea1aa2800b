"""Held-out scores: label words and choices by likelihood, completions by greedy generation.

Evaluation forwards are guests without perturbation: they share gathers like the lanes of a step
and leave no trace in the engine. Examples are dealt to ranks in chunks whose composition does not
depend on the world size, so neither do the scores.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy
from torchmetrics.functional.text import squad
from transformers import PreTrainedTokenizerBase

from addax_ds.config import RunConfig
from addax_ds.data.batches import Batch, collate_choices, collate_prompts
from addax_ds.data.tasks import Example
from addax_ds.loss import choice_scores, takes_logits_to_keep
from addax_ds.training.models import Optimizer

# Evaluation forwards that share one gather: more save traffic, each keeps a hidden state.
LANES = 4


class EvaluationStoppedError(Exception):
    """A rank was asked to end in the middle of an evaluation."""


def metric_name(examples: Sequence[Example]) -> str:
    """The score that counts: accuracy for label words and choices, F1 for completions, as in MeZO's protocol."""
    return "accuracy" if examples[0].choices else "f1"


def evaluate(
    optimizer: Optimizer,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    inputs: frozenset[str],
    max_new_tokens: int,
    stop: str | None = None,
    asked_to_end: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Scores in [0, 1]: accuracy, or exact_match and f1 (a collective; the same on every rank).

    inputs: names that the model's forward takes. max_new_tokens: tokens generated per completion. stop: text
    before which a completion ends. asked_to_end: looked at now and then; raises `EvaluationStoppedError` on every
    rank where it is true on any.
    """
    engine = optimizer.engine
    pad_id = tokenizer.pad_token_id

    def run_of(chunk: list[Example]) -> Callable[[nn.Module], torch.Tensor]:
        if chunk[0].choices:
            batch = placed(collate_choices(chunk, pad_id, config.padding), inputs, engine.device)
            return lambda model: _choice_score(choice_scores(model, batch), chunk)
        batch = placed(collate_prompts(chunk, pad_id), inputs, engine.device)
        return lambda model: _completion_score(_generate(model, batch, max_new_tokens), chunk, tokenizer, stop)

    # Like lengths together, so that little of a chunk is padding.
    order = sorted(range(len(examples)), key=lambda index: (examples[index].length, index))
    chunks = _chunks(order, [rows_of(example) for example in examples], config.eval_micro_batch)
    scores = torch.zeros(len(examples), 2, dtype=torch.float64)
    for first in range(0, len(chunks), engine.world_size * LANES):
        if engine.sum(torch.tensor([float(asked_to_end())])).item():
            raise EvaluationStoppedError
        numbers = range(first + engine.rank, min(first + engine.world_size * LANES, len(chunks)), engine.world_size)
        # A rank without a chunk of its own takes part in the gathers with the shortest.
        runs = [run_of([examples[index] for index in chunks[number]]) for number in numbers or (0,)]
        for number, result in zip(numbers, optimizer.run_guests(runs), strict=False):
            scores[chunks[number]] = result
    first_score, second_score = engine.sum(scores).mean(dim=0).tolist()
    if examples[0].choices:
        return {"accuracy": first_score}
    return {"exact_match": first_score, "f1": second_score}


def rows_of(example: Example) -> int:
    """Sequences that a forward scores the example with."""
    one_forward = example.contrasted and all(len(choice) == 1 for choice in example.choices)
    return 1 if one_forward else max(len(example.choices), 1)


def _chunks(order: Sequence[int], rows: Sequence[int], size: int) -> list[list[int]]:
    """`order` in chunks whose forwards hold `size` sequences at most, and one example at least.

    All examples of a chunk have as many rows as the one with most: a record of ReCoRD has dozens of choices.
    """
    chunks: list[list[int]] = []
    most = 0
    for index in order:
        most = max(most, rows[index])
        if not chunks or (len(chunks[-1]) + 1) * most > size:
            chunks.append([])
            most = rows[index]
        chunks[-1].append(index)
    return chunks


def placed(batch: Batch, inputs: frozenset[str], device: torch.device) -> Batch:
    """The batch on a device, without what neither the model's forward nor a loss takes."""
    wanted = inputs | {"labels", "choices", "answer"}
    return {key: value.to(device) for key, value in batch.items() if key in wanted}


def _choice_score(scores: torch.Tensor, chunk: list[Example]) -> torch.Tensor:
    """float64 [examples, 2], 1 where the likeliest choice is right (twice, for the shape)."""
    # A row may end in scores of fillers.
    likeliest = [int(row[: len(example.choices)].argmax()) for row, example in zip(scores, chunk, strict=True)]
    # Any right answer will do.
    right = [best if best in e.also_right else e.answer for best, e in zip(likeliest, chunk, strict=True)]
    found, wanted = (torch.tensor(numbers).unsqueeze(1) for numbers in (likeliest, right))
    most = max(scores.shape[1], 2)  # the library takes no fewer
    hits = multiclass_accuracy(found, wanted, num_classes=most, average="micro", multidim_average="samplewise")
    return hits.double().unsqueeze(1).expand(-1, 2)


def _completion_score(
    tokens: torch.Tensor, chunk: list[Example], tokenizer: PreTrainedTokenizerBase, stop: str | None
) -> torch.Tensor:
    """float64 [examples, 2]: exact match and F1 of each greedy answer (the SQuAD measures)."""
    scores = []
    for example, row in zip(chunk, tokens.tolist(), strict=True):
        if tokenizer.eos_token_id in row:
            row = row[: row.index(tokenizer.eos_token_id)]
        answer = str(tokenizer.decode(row, skip_special_tokens=True))
        answer = answer.partition(stop)[0] if stop is not None else answer
        references: dict[str, Any] = {"answer_start": [0] * len(example.references), "text": list(example.references)}
        result = squad([{"prediction_text": answer.strip(), "id": "0"}], [{"answers": references, "id": "0"}])
        scores.append([float(result["exact_match"]) / 100, float(result["f1"]) / 100])
    return torch.tensor(scores, dtype=torch.float64)


def _generate(model: nn.Module, batch: Batch, count: int) -> torch.Tensor:
    """Exactly `count` greedy tokens after each left-padded prompt: int64 [batch, count].

    No early end: every rank must run the same number of forwards.
    """
    words, mask, cache, generated = batch["input_ids"], batch["attention_mask"], None, []
    keeps = not hasattr(model, "prompt_encoder")  # peft puts the bare prefix in place of any cache
    last: dict[str, Any] = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}
    step = dict(batch)
    for _ in range(count):
        output = model(**step, **last, past_key_values=cache, use_cache=keeps)
        token = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        generated.append(token)
        words, mask = (torch.cat(pair, dim=1) for pair in ((words, token), (mask, torch.ones_like(token))))
        cache = output.past_key_values if keeps else None
        step = {"input_ids": token if keeps else words, "attention_mask": mask}
        if "position_ids" in batch:
            step["position_ids"] = mask.sum(dim=1, keepdim=True) - 1
    return torch.cat(generated, dim=1)
