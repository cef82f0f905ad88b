"""The oracle itself, against published vectors, loops over single entries, PyTorch and finite differences."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from flash_attention.reference import (
    dropout_keep_mask,
    philox4x32_7,
    reference_attention,
    reference_attention_varlen,
    standard_attention,
)

from .cases import Case


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0x00000000, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (0xFFFFFFFF, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    ],
)
def test_philox_gives_the_known_answers_of_random123(word: int, expected: tuple[int, ...]) -> None:
    words = torch.tensor(word)
    assert tuple(x.item() for x in philox4x32_7((words,) * 4, (words,) * 2)) == expected


def keeps(seed: int, offset: int, head: int, i: int, j: int, p: float) -> bool:
    """The definition, in Python's own integers, one entry at a time."""
    c = [8 * (i // 16) + i % 8, 4 * (j // 16) + j % 8 // 2, head, offset]
    key = [seed % 2**32, seed >> 32]
    for _ in range(7):
        (high0, low0), (high1, low1) = divmod(0xD2511F53 * c[0], 2**32), divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    field = 4 * (j // 8 % 2) + 2 * (i // 8 % 2) + j % 2
    return (c[field // 2] >> 16 * (field % 2)) % 2**16 >= round(p * 65536)


@pytest.mark.parametrize("seed", [0, 7, 2**63, 2**64 - 1, 0x123456789ABCDEF0])
def test_dropout_mask_follows_its_definition_entry_by_entry(seed: int) -> None:
    mask = dropout_keep_mask(seed, 3, 2, 3, 19, 37, 0.4)
    for b, h, i, j in itertools.product(range(2), range(3), range(19), range(37)):
        assert mask[b, h, i, j].item() == keeps(seed, 3, 3 * b + h, i, j, 0.4)
    as_tensor = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])
    assert torch.equal(dropout_keep_mask(as_tensor, 3, 2, 3, 19, 37, 0.4), mask)


def attention_by_loops(q, k, v, *, causal, window_size, softcap, softmax_scale, bias, alibi_slopes, sinks, **options):
    """One score at a time."""
    seqlens_q, seqlens_k, dropout_p, seed = (options[x] for x in ("seqlens_q", "seqlens_k", "dropout_p", "seed"))
    (batch, heads, seqlen_q, _), heads_kv = q.shape, k.shape[1]
    o = torch.zeros(batch, heads, seqlen_q, v.shape[-1], dtype=torch.float64)
    lse = torch.full((batch, heads, seqlen_q), -math.inf, dtype=torch.float64)
    for b, h in itertools.product(range(batch), range(heads)):
        for i in range(seqlens_q[b]):
            offset = int(seqlens_k[b] - seqlens_q[b])
            weights, values = [], []
            for j in range(seqlens_k[b]):
                if causal and j > i + offset:
                    continue
                if window_size[0] >= 0 and j < i + offset - window_size[0]:
                    continue
                if window_size[1] >= 0 and j > i + offset + window_size[1]:
                    continue
                h_kv = h // (heads // heads_kv)
                s = softmax_scale * torch.dot(q[b, h, i], k[b, h_kv, j]).item()
                s = softcap * math.tanh(s / softcap) if softcap else s
                s += bias[b, h, i, j].item() - alibi_slopes[b, h].item() * abs(i + offset - j)
                weights.append(math.exp(s))
                values.append(v[b, h_kv, j] * keeps(seed, 0, b * heads + h, i, j, dropout_p) / (1 - dropout_p))
            total = sum(weights) + math.exp(sinks[h])
            lse[b, h, i] = math.log(total)
            o[b, h, i] = sum((w / total * x for w, x in zip(weights, values, strict=True)), torch.zeros(v.shape[-1]))
    return o, lse


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window_size", [(-1, -1), (2, 1), (0, -1), (-1, 0)])
@pytest.mark.parametrize("softcap", [0.0, 0.7])
def test_oracle_agrees_with_loops_over_every_entry(causal: bool, window_size: tuple[int, int], softcap: float) -> None:
    q, k, v = random(3, 4, 6, 5), random(3, 2, 9, 5, seed=1), random(3, 2, 9, 3, seed=2)
    options = {
        "causal": causal, "window_size": window_size, "softcap": softcap, "softmax_scale": 0.6,
        "bias": random(3, 4, 6, 9, seed=3), "alibi_slopes": random(3, 4, seed=4).abs(), "sinks": random(4, seed=5),
        "seqlens_q": torch.tensor([6, 3, 5]), "seqlens_k": torch.tensor([4, 9, 0]), "dropout_p": 0.3, "seed": 2**63 + 5,
    }  # fmt: skip
    o, lse = reference_attention(q, k, v, **options)
    o_loops, lse_loops = attention_by_loops(q, k, v, **options)
    torch.testing.assert_close(o, o_loops, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, lse_loops, rtol=1e-12, atol=1e-12)


def test_oracle_agrees_with_pytorch() -> None:
    q, k, v, bias = (
        random(2, 4, 13, 8),
        random(2, 2, 13, 8, seed=1),
        random(2, 2, 13, 6, seed=2),
        random(2, 1, 13, 13, seed=3),
    )
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(reference_attention(q, k, v, causal=True, softmax_scale=0.3)[0], expected)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
    torch.testing.assert_close(reference_attention(q, k, v, bias=bias)[0], expected)


def test_oracle_agrees_with_finite_differences() -> None:
    features = {"causal": True, "softcap": 2.0, "bias": "1hqk", "alibi": "bh", "sinks": True, "dropout_p": 0.2}
    case = Case(
        "f64", 3, 2, heads_q=4, heads_kv=2, seqlen_q=4, seqlen_k=5, lengths_q=(4, 3), lengths_k=(2, 5), **features
    )
    inputs = case.inputs()
    names = tuple(inputs.leaves)
    fixed = {name: x for name, x in inputs.options.items() if name not in names}

    def call(*leaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        o, lse = reference_attention(*leaves[:3], **dict(zip(names[3:], leaves[3:], strict=True)), **fixed)
        return o, lse[lse.isfinite()]

    leaves = tuple(x.detach().nan_to_num(0).requires_grad_() for x in inputs.leaves.values())
    assert torch.autograd.gradcheck(call, leaves)


def test_padding_and_packing_equal_one_sequence_at_a_time() -> None:
    lengths_q, lengths_k = (3, 0, 6), (5, 4, 2)
    q, k, v = random(3, 2, 6, 4), random(3, 2, 5, 4, seed=1), random(3, 2, 5, 4, seed=2)
    options = {"causal": True, "sinks": random(2, seed=3), "window_size": (3, -1)}
    padded_o, padded_lse = reference_attention(
        q, k, v, seqlens_q=torch.tensor(lengths_q), seqlens_k=torch.tensor(lengths_k), **options
    )
    packed = [
        torch.cat([x[b, :, :n].transpose(0, 1) for b, n in enumerate(lengths)])
        for x, lengths in ((q, lengths_q), (k, lengths_k), (v, lengths_k))
    ]
    cu_seqlens = [torch.tensor([0, *itertools.accumulate(lengths)]) for lengths in (lengths_q, lengths_k)]
    packed_o, packed_lse = reference_attention_varlen(*packed, *cu_seqlens, **options)
    for b, (len_q, len_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        o, lse = reference_attention(
            q[b : b + 1, :, :len_q], k[b : b + 1, :, :len_k], v[b : b + 1, :, :len_k], **options
        )
        torch.testing.assert_close(padded_o[b, :, :len_q], o[0])
        torch.testing.assert_close(padded_lse[b, :, :len_q], lse[0])
        rows = slice(*cu_seqlens[0][b : b + 2].tolist())
        torch.testing.assert_close(packed_o[rows].transpose(0, 1), o[0])
        torch.testing.assert_close(packed_lse[:, rows], lse[0])
        assert (padded_o[b, :, len_q:] == 0).all()
        assert (padded_lse[b, :, len_q:] == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_standard_attention_keeps_the_input_dtype(dtype: torch.dtype) -> None:
    q, k, v = (random(2, 2, 9, 8, seed=n).to(dtype) for n in range(3))
    o, lse = standard_attention(q, k, v, causal=True, return_lse=True)
    assert o.dtype == dtype
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    oracle_o, oracle_lse = reference_attention(q, k, v, causal=True)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(o.double(), oracle_o, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), oracle_lse, rtol=tolerance, atol=tolerance)
    assert torch.equal(standard_attention(q, k, v, causal=True), o)
