"""Holds the four constant factors of Granite models: of embeddings, scores, sums and logits."""

from dataclasses import replace

from decodax.layers.mixers.gqa import GQAConfig
from decodax.models.config import BlockConfig, Residual
from decodax.models.embedding import EmbeddingConfig
from decodax.models.families.layer import Fields, Layer, attention, pre_norm, with_residuals
from decodax.models.head import HeadConfig


def scaled_scores(layer: Layer) -> GQAConfig:
    return replace(attention(layer), scale=float(layer.fields["attention_multiplier"]))


def scaled_block(layer: Layer) -> BlockConfig:
    added = Residual(add=float(layer.fields["residual_multiplier"]))
    return with_residuals(pre_norm(layer), added, added)


def scaled_embedding(fields: Fields) -> EmbeddingConfig:
    return EmbeddingConfig(float(fields["embedding_multiplier"]))


def scaled_head(fields: Fields) -> HeadConfig:
    return HeadConfig(1 / float(fields["logits_scaling"]))
