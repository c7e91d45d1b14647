"""The modules of transformers themselves, where 5.20.2 or later is installed: a small model is made, saved, and loaded
as users load it; build/compress reads the checkpoint that transformers wrote."""

import copy
import os
import tempfile

import torch

import files
from cases import generator
from closeness import Tally, expect
from formulas import points_of
from gradients import strays
from runner import test

OLDEST = (5, 20, 2)
CSA, HCA = "compressed_sparse_attention", "heavily_compressed_attention"
YARN = dict(rope_type="yarn", factor=16, original_max_position_embeddings=65536, beta_fast=32, beta_slow=1)

PARAMETERS = ("kv_proj.weight", "gate_proj.weight", "position_bias", "kv_norm.weight")
GRADIENTS = ("dx", "dwkv", "dwgate", "dape", "dnorm")

try:
    import transformers
    VERSION = transformers.__version__
    INSTALLED = tuple(int("0" + "".join(filter(str.isdigit, part))) for part in VERSION.split(".")[:3]) >= OLDEST
except ImportError:
    VERSION, INSTALLED = "not found", False
if INSTALLED:
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Model
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def found():
    return f"transformers {VERSION}" + ("" if INSTALLED or VERSION == "not found" else ", older than 5.20.2")


def real(*values):
    """A test that needs them."""
    return test(*values) if INSTALLED else lambda function: function


class Small:
    """A model of two layers, CSA and HCA, on disk in fp32; YaRN or none, as a bare config has it."""

    def __init__(self, random, folder, yarn):
        self.head_dim, self.rope_dim, self.random = random.choice((64, 128)), random.choice((16, 32)), random
        self.rates = {CSA: random.choice((4, 4, 3, 8)), HCA: random.choice((128, 128, 32, 50))}
        self.config = DeepseekV4Config(
            vocab_size=32, hidden_size=random.randint(48, 300), moe_intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, head_dim=self.head_dim, q_lora_rank=16, n_routed_experts=2, num_experts_per_tok=1,
            compress_rates=self.rates, layer_types=[CSA, HCA], mlp_layer_types=["moe", "moe"], hc_mult=2, o_groups=1,
            o_lora_rank=16, index_n_heads=2, index_head_dim=random.choice((32, 48)), index_topk=4,
            partial_rotary_factor=self.rope_dim / self.head_dim, rope_parameters=dict(YARN) if yarn else None)
        self.options = ["--rope-dim", str(self.rope_dim), "--yarn-factor", str(YARN["factor"] if yarn else 1)]
        self.folder, self.file = folder, os.path.join(folder, "model.safetensors")
        self.model = DeepseekV4Model(self.config)
        self.fill(generator(random))
        self.model.save_pretrained(folder)

    def fill(self, source):
        """Gates and scores of size 1."""
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                if "compressor" in name:
                    drawn = torch.randn(value.shape, generator=source)
                    value.copy_(drawn / value.shape[1] ** 0.5 if "proj" in name else
                                1 + drawn / 4 if "norm" in name else drawn / 2)

    def load_as_bf16(self):
        """As `from_pretrained(dtype=torch.bfloat16)` gives it: ape and norm stay fp32."""
        self.model = DeepseekV4Model.from_pretrained(self.folder, dtype=torch.bfloat16)
        self.model.save_pretrained(self.folder)

    def round_all(self):
        """`module.to(torch.bfloat16)`, with its frequencies put back to fp32."""
        exact = copy.deepcopy(dict(self.model.named_buffers()))
        self.model.to(torch.bfloat16)
        with torch.no_grad():
            for name, value in self.model.named_buffers():
                if "inv_freq" in name:
                    value.data = exact[name]
        files.write(self.file, {"model." + name: value for name, value in self.model.state_dict().items()})

    def hidden_states(self, dtype, tokens):
        return torch.randn(2, tokens, self.config.hidden_size, generator=generator(self.random)).to(dtype)

    def tokens(self):
        """So many that every layer has entries enough, and a tail that fills no window."""
        return 6 * self.rates[HCA] + self.random.randint(0, self.rates[HCA] - 1)

    def compressor(self, layer):
        return self.model.layers[layer].self_attn.compressor

    def entries(self, layer, x, pieces, first_position=0):
        """What the layer's cache holds after `x` came in pieces: by name, `compressor` and (CSA) `indexer`."""
        cache, position = transformers.DynamicCache(config=self.config), first_position
        for piece in x.split(pieces, 1):
            count = piece.shape[1]
            ids = torch.arange(position, position + count).expand(len(x), -1)
            residual = torch.zeros(len(x), count, self.config.q_lora_rank, dtype=x.dtype)
            self.compressor(layer)(piece, residual, ids, cache, layer)
            position += count
        return {name: entries.detach() for name, entries in cache.layers[layer].compressed_kv.items()}


# Each kind of compressor: its layer, its name in the cache, and its prefix in checkpoints and in the module.
KINDS = {"CSA": (0, "compressor", ("layers.0.attn.compressor", "model.layers.0.self_attn.compressor")),
         "CSA's indexer": (0, "indexer", ("layers.0.attn.indexer.compressor",
                                          "model.layers.0.self_attn.compressor.indexer")),
         "HCA": (1, "compressor", ("layers.1.attn.compressor", "model.layers.1.self_attn.compressor"))}


def pieces_of(random, tokens):
    """Lengths of the pieces in which tokens come: a prompt, single tokens, whatever."""
    pieces = []
    while tokens > sum(pieces):
        pieces.append(min(tokens - sum(pieces), random.choice((1, 1, 2, random.randint(1, 300)))))
    return pieces


def agree(context, small, dtype, preset, spelling=0):
    """Every kind's entries, from one piece on their side and from several; ours in chunks."""
    x, tally = small.hidden_states(dtype, small.tokens()), Tally()
    files.write(context.program.input, {"x": x})
    for kind, (layer, name, prefixes) in KINDS.items():
        chunk = str(context.random.randint(1, x.shape[1]))
        got = context.program.run(small.file, context.program.input, "--prefix", prefixes[spelling], "--preset", preset,
                                  "--drop-tail", "--chunk", chunk, *small.options)["out"]
        for pieces in ([x.shape[1]], pieces_of(context.random, x.shape[1])):
            with torch.no_grad():
                want = small.entries(layer, x, pieces)[name]
            tally.add_stage("out", points_of(preset), got, want, f"{kind}, {len(pieces)} pieces, {small.config}")
    context.say(tally)


@real("no YaRN", "YaRN")
def transformers_in_fp32_is_none(context, rope):
    with tempfile.TemporaryDirectory() as folder:
        agree(context, Small(context.random, folder, rope == "YaRN"), torch.float32, "none")


@real("no YaRN", "YaRN")
def transformers_loaded_as_bf16_is_the_preset_transformers(context, rope):
    with tempfile.TemporaryDirectory() as folder:
        small = Small(context.random, folder, rope == "YaRN")
        small.load_as_bf16()
        agree(context, small, torch.bfloat16, "transformers")


@real("no YaRN", "YaRN")
def transformers_rounded_by_to_bfloat16_is_transformers_and_score(context, rope):
    with tempfile.TemporaryDirectory() as folder:
        small = Small(context.random, folder, rope == "YaRN")
        small.round_all()
        agree(context, small, torch.bfloat16, "transformers+score", 1)


@real()
def transformers_counts_positions_from_the_caches_first_entry(context):
    """Whatever its position_ids say: what is --start 0 here."""
    with tempfile.TemporaryDirectory() as folder:
        small = Small(context.random, folder, True)
        x = small.hidden_states(torch.float32, small.tokens())
        with torch.no_grad():
            for layer in (0, 1):
                near, far = (small.entries(layer, x, [x.shape[1]], start) for start in (0, 5000))
                for name in near:
                    expect(torch.equal(near[name], far[name]), f"{name} moved with position_ids: {small.config}")


@real("CSA", "HCA")
def transformers_gradients_by_autograd_are_ours(context, kind):
    layer, _, prefixes = KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        small = Small(context.random, folder, False)
        rate = small.rates[CSA if kind == "CSA" else HCA]
        x, module = small.hidden_states(torch.float32, 6 * rate).requires_grad_(True), small.compressor(layer)
        ids = torch.arange(x.shape[1]).expand(len(x), -1)
        residual = torch.zeros(len(x), x.shape[1], small.config.q_lora_rank)
        out = module(x, residual, ids, None, layer)[0].squeeze(1)
        dout = torch.randn(out.shape, generator=generator(context.random))
        given = [x, *(module.get_parameter(name) for name in PARAMETERS)]
        wanted = torch.autograd.grad(out, given, dout)
        files.write(context.program.input, {"x": x, "dout": dout})
        got = context.program.run(small.file, context.program.input, "--prefix", prefixes[0], "--preset", "none",
                                  "--backward", "dout", *small.options)
        far = [strays(got[name], want) for name, want in zip(GRADIENTS, wanted)]
        context.say(", ".join(f"{name} {value:.1e}" for name, value in zip(GRADIENTS, far)))
        expect(max(far) <= 1e-5, f"{context.said}: {kind}, {small.config}")
