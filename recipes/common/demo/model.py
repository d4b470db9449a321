"""A sentence encoder with mean pooling and a linear head, as a transformers model.

This file imports nothing of subspace_peft, on purpose: the demo loads it by its path into a process that must not know
the package.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertModel, BertPreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanPooledClassifier(BertPreTrainedModel):
    """BERT, the mean of its last hidden states over real tokens, and a linear `classifier`.

    The demo's encoder was trained with mean pooling; the pooler of `BertForSequenceClassification` was never trained.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput:
        """Logits (batch, num_labels), and the cross-entropy where `labels` (batch,) int64 are given.

        Args:
            input_ids: (batch, length) int64, or None where `inputs_embeds` (batch, length, hidden) is given.
            attention_mask: (batch, length), 1 at real tokens; all are real by default.
            output_attentions, output_hidden_states, return_dict: PEFT passes them to every classifier; this one has
                nothing more to return.
        """
        hidden = self.bert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
        ).last_hidden_state
        logits = self.classifier(mean_of_real_tokens(hidden, attention_mask))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def mean_of_real_tokens(hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The mean (batch, hidden) of (batch, length, hidden) over the positions where the mask (batch, length) is 1."""
    if attention_mask is None:
        return hidden.mean(dim=1)
    weight = attention_mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def load_encoder(encoder: str | Path, labels: int, seed: int) -> MeanPooledClassifier:
    """The pretrained encoder in folder `encoder` under a new head for `labels` classes, drawn under `seed`.

    Dropout is off: the runs are too short to need it, and attention without it takes two thirds of the time on a CPU.
    """
    torch.manual_seed(seed)
    model = MeanPooledClassifier.from_pretrained(
        str(encoder), num_labels=labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, dtype=torch.float32
    )
    # drawn here: how transformers draws missing weights (when, in which order) changes between its versions
    with torch.no_grad():
        model.classifier.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(seed))
        model.classifier.bias.zero_()
    return model


def load_tokenizer(encoder: str | Path) -> PreTrainedTokenizerBase:
    """The encoder's own tokenizer."""
    return AutoTokenizer.from_pretrained(str(encoder))
