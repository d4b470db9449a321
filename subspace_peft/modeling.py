"""Encoders under a linear head, as transformers models: texts under mean pooling, images.

This module imports nothing of the package, so that it can be loaded by its path where only stock PEFT is known.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput, SequenceClassifierOutput


class MeanPooledClassifier(PreTrainedModel):
    """An encoder (BERT, RoBERTa, …), the mean of its last hidden states over real tokens, and a linear `classifier`.

    For encoders that were trained with mean pooling: the pooler of `AutoModelForSequenceClassification` was not. Its
    modules are called as in that class, so that adapters and bases fit both.

    Args:
        encoder: what `AutoModel` makes, its configuration's `num_labels` set; one label means a number is predicted.
            Or a configuration, of which an encoder with random weights is made.
    """

    # the encoder has checked already what it can do
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, encoder: PreTrainedModel | PreTrainedConfig) -> None:
        given = encoder
        if isinstance(encoder, PreTrainedConfig):
            encoder = AutoModel.from_config(encoder)
        super().__init__(encoder.config)
        self.num_labels = encoder.config.num_labels
        self.base_model_prefix = encoder.base_model_prefix
        setattr(self, encoder.base_model_prefix, encoder)
        self.classifier = nn.Linear(encoder.config.hidden_size, self.num_labels)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)
        if given is not encoder:  # weights of an encoder that was given stay as they are
            self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> MeanPooledClassifier:
        """Load an encoder under a new head, or such a model that was saved whole, as `AutoPeftModel` does.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            args: as transformers' own.
            kwargs: as transformers' own; `num_labels` and other values of the configuration among them.
        """
        if not isinstance(kwargs.get("config"), PreTrainedConfig):
            place = kwargs.pop("config", None) or pretrained_model_name_or_path
            config, kwargs = AutoConfig.from_pretrained(place, return_unused_kwargs=True, **kwargs)
            kwargs["config"] = config
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def card_code(self) -> list[str]:
        """Return the lines of code that make such a model, for a task's card."""
        encoder = f"AutoModel.from_pretrained({self.config._name_or_path!r}, num_labels={self.num_labels})"
        return _code(self, encoder)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **inputs: Any,
    ) -> SequenceClassifierOutput:
        """Return logits (batch, num_labels), and where `labels` (batch,) are given the loss.

        The loss is the cross-entropy, or the squared error of one label.

        Args:
            input_ids: (batch, length) int64, or None where `inputs_embeds` (batch, length, hidden) is given.
            attention_mask: (batch, length), 1 at real tokens; all are real by default.
            token_type_ids: (batch, length), for encoders that know them.
            labels: (batch,), int64 classes or floats.
            inputs: passed on to the encoder.
        """
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        encoder = getattr(self, self.base_model_prefix)
        # PEFT passes what it knows of classifiers (output_attentions, return_dict, …), mostly None
        given = {key: value for key, value in inputs.items() if value is not None}
        hidden = encoder(input_ids=input_ids, attention_mask=attention_mask, **given)[0]
        if attention_mask is None:
            pooled = hidden.mean(dim=1)
        else:
            weight = attention_mask.to(hidden.dtype).unsqueeze(-1)
            pooled = (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
        logits = self.classifier(pooled)
        if labels is None:
            return SequenceClassifierOutput(logits=logits)
        if self.num_labels == 1:
            loss = F.mse_loss(logits.squeeze(-1).float(), labels.float())
        else:
            loss = F.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class ImageClassifier(PreTrainedModel):
    """A vision encoder (ViT, DINOv2, …) under a linear `classifier`, after its last norm.

    Args:
        encoder: what `AutoModel` makes.
        classes: how many.
        pooling: ``class`` or ``mean``.
    """

    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, encoder: PreTrainedModel, classes: int, pooling: str) -> None:
        super().__init__(encoder.config)
        self.base_model_prefix, self.pooling = encoder.base_model_prefix or "encoder", pooling
        setattr(self, self.base_model_prefix, encoder)
        self.classifier = nn.Linear(encoder.config.hidden_size, classes)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def card_code(self) -> list[str]:
        """Return the lines of code that make such a model, for a task's card."""
        encoder = f"AutoModel.from_pretrained({self.config._name_or_path!r})"
        return _code(self, f"{encoder}, {self.classifier.out_features}, {self.pooling!r}")

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """Return logits (batch, classes), and where `labels` are given the cross-entropy.

        Args:
            pixel_values: (batch, 3, height, width).
            labels: (batch,) int64.
        """
        hidden = getattr(self, self.base_model_prefix)(pixel_values=pixel_values)[0]
        # some encoders keep registers between the class token and the patches
        patches = 1 + (getattr(self.config, "num_register_tokens", 0) or 0)
        logits = self.classifier(hidden[:, 0] if self.pooling == "class" else hidden[:, patches:].mean(1))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def _code(model: PreTrainedModel, given: str) -> list[str]:
    name = type(model).__name__
    imports = [f"from subspace_peft.modeling import {name}", "from transformers import AutoModel"]
    return [*imports, "", f"base_model = {name}({given})"]
