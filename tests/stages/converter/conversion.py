"""A stand-in for llama.cpp's converter: the names that a hook touches, for Llama alone, and faults to choose from."""

import os

import gguf
import torch
from safetensors.torch import load_file

TEXT_MODEL_MAP = {"LlamaForCausalLM": "llama"}
FAULT = os.environ.get("CONVERTER_FAULT", "")


class LazyTorchTensor:
    def __init__(self, meta, args, func):
        self.shape, self.args, self.func = tuple(meta.shape), args, func

    @staticmethod
    def meta_with_dtype_and_shape(dtype, shape):
        return torch.empty(shape, dtype=dtype, device="meta")


class ModelBase:
    def __init__(self, folder, out):
        self.model_tensors = {name: lambda t=t: t for name, t in load_file(folder / "model.safetensors").items()}
        self.gguf_writer = gguf.GGUFWriter(out, "llama")

    def filter_tensors(self, item):
        return item

    def dequant_model(self):
        raise AssertionError("replaced by the hook")

    def tensor_force_quant(self, name, new_name, bid, n_dims):
        return False

    def write(self):
        self.gguf_writer.add_tokenizer_pre(self.get_vocab_base_pre(None))
        self.dequant_model()
        self.gguf_writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        for name, generate in self.model_tensors.items():
            tensor = generate()
            if isinstance(tensor, LazyTorchTensor):
                tensor = tensor.func(*tensor.args)
            if "q_proj" in name:
                tensor = tensor.flip(0)
            if "k_proj" in name and FAULT == "computes":
                tensor = tensor * 2
            if "k_proj" in name and FAULT == "drops":
                continue
            kind = self.tensor_force_quant(name, name, None, tensor.dim()) or gguf.GGMLQuantizationType.F32
            self.gguf_writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
        self.gguf_writer.write_header_to_file()
        self.gguf_writer.write_kv_data_to_file()
        self.gguf_writer.write_tensors_to_file()
        self.gguf_writer.close()


class TextModel(ModelBase):
    def get_vocab_base_pre(self, tokenizer):
        return "guessed"
