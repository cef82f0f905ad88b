"""The cases of attention over a key/value cache that every kernel is held to."""

from .cache_cases import CacheCase

DTYPES = (
    CacheCase(),
    CacheCase(append=False, lengths=(37, 0, 1)),
    CacheCase("f64", seqlen_q=3),
    CacheCase("f64", append=False, seqlen_q=2, page_size=16),
    CacheCase("f16", head_dim=64, heads_q=8),
    CacheCase("bf16", head_dim=64, heads_q=8, seqlen_q=2, lengths=(130, 7, 64)),
    CacheCase("bf16", head_dim=128, append=False, lengths=(300, 1, 129)),
)
LENGTHS = (
    CacheCase(lengths=(0, 0), seqlen_q=5),
    CacheCase(lengths=(60, 64), seqlen_q=4, slack=0),  # a full cache
    CacheCase("bf16", append=False, lengths=(64,), slack=0),
    CacheCase(append=False, lengths=(3, 0, 40), seqlen_q=5),  # rows before the first key see none
    CacheCase(append=False, lengths=(3, 0, 40), seqlen_q=5, causal=False),
    CacheCase("bf16", head_dim=64, append=False, lengths=(3, 0, 90), seqlen_q=70, page_size=16),
    CacheCase("bf16", head_dim=64, lengths=(1, 1000, 511), heads_q=8),
    CacheCase(lengths=(1,), append=False),
    CacheCase(lengths=()),
    CacheCase(lengths=(5, 9), seqlen_q=0),
    CacheCase(lengths=(0, 0), append=False, slack=0),
    CacheCase(lengths=(0, 0), append=False, page_size=16, slack=0, sinks=True),
)
QUERIES = (
    CacheCase("bf16", head_dim=64, seqlen_q=5),
    CacheCase("f16", head_dim=64, seqlen_q=16, lengths=(64, 3)),
    CacheCase("bf16", head_dim=64, seqlen_q=32, lengths=(64, 0, 31)),
    CacheCase(head_dim=64, seqlen_q=33, lengths=(65, 100)),
    CacheCase("bf16", head_dim=128, seqlen_q=33, lengths=(65, 100)),
    CacheCase("f16", head_dim=64, seqlen_q=100, lengths=(57, 0)),
    CacheCase("bf16", head_dim=64, seqlen_q=100, lengths=(157, 0), causal=False),
    CacheCase(seqlen_q=100, lengths=(57, 0), heads_q=2, heads_kv=1),
)
LAYOUTS = (
    CacheCase(layout="blhd", seqlen_q=3),
    CacheCase("bf16", head_dim=64, layout="blhd", seqlen_q=3, batch_idx=True),
    CacheCase("bf16", head_dim=64, layout="blhd", page_size=16, append=False),
    CacheCase(layout="gaps", seqlen_q=3),
    CacheCase("bf16", head_dim=64, layout="gaps", seqlen_q=2),
    CacheCase("f16", head_dim=64, layout="gaps", page_size=16, rotary="halves"),
    CacheCase(batch_idx=True),
    CacheCase("f16", head_dim=64, batch_idx=True, append=False),
)
PAGES = (
    *(CacheCase(page_size=size, seqlen_q=2) for size in (1, 3, 64)),
    *(
        CacheCase("bf16", head_dim=64, page_size=size, heads_q=8, lengths=(300, 63, 64, 1))
        for size in (1, 3, 16, 64, 256)
    ),
    CacheCase("f16", head_dim=128, page_size=16, seqlen_q=33, lengths=(15, 16, 17)),
    CacheCase("f16", head_dim=128, page_size=1, append=False, lengths=(100, 9)),
    CacheCase("bf16", head_dim=64, page_size=256, seqlen_q=5, lengths=(254, 256, 255), slack=300),
)
HEADS = (
    CacheCase(heads_q=2, heads_kv=2),
    CacheCase(heads_q=8, heads_kv=1, seqlen_q=2),
    CacheCase("bf16", head_dim=64, heads_q=3, heads_kv=3),
    CacheCase("bf16", head_dim=64, heads_q=32, heads_kv=4, lengths=(200, 31)),
    CacheCase("bf16", head_dim=128, heads_q=12, heads_kv=4, page_size=16),
    CacheCase("f16", head_dim=64, heads_q=20, heads_kv=1, seqlen_q=4, lengths=(90, 33)),
)
HEAD_DIMS = (
    CacheCase(head_dim=40),
    CacheCase(head_dim=5, head_dim_v=3),
    CacheCase(head_dim=256, lengths=(20, 70)),
    CacheCase(head_dim=512, lengths=(20, 70), page_size=16),
    CacheCase("bf16", head_dim=40),
    CacheCase("f16", head_dim=96, seqlen_q=2, page_size=16),
    CacheCase("bf16", head_dim=256, lengths=(20, 130)),
    CacheCase("bf16", head_dim=512, lengths=(20, 70)),
    CacheCase("f16", head_dim=1, lengths=(20, 70)),
    CacheCase("bf16", head_dim=192, head_dim_v=128, seqlen_q=2, rotary="halves", rotary_dim=64),
    CacheCase("f16", head_dim=64, head_dim_v=96, page_size=16),
    CacheCase("bf16", head_dim=36, head_dim_v=72),
)
ROTARY = (
    CacheCase(rotary="interleaved", seqlen_q=3),
    CacheCase(rotary="halves", page_size=16),
    CacheCase("f64", rotary="halves", rotary_dim=16, seqlen_q=2),
    CacheCase("bf16", head_dim=64, rotary="interleaved", heads_q=8),
    CacheCase("f16", head_dim=64, rotary="halves", rotary_dtype="f32", seqlen_q=5),
    CacheCase("bf16", head_dim=128, rotary="halves", rotary_dim=32, layout="blhd", page_size=16),
    CacheCase("bf16", head_dim=128, rotary="interleaved", rotary_dim=34, rotary_dtype="f32", seqlen_q=33),
    CacheCase("f16", head_dim=40, rotary="halves", rotary_dim=6, causal=False),
)
SCORES = (
    CacheCase(causal=False, seqlen_q=4),
    CacheCase(window=(9, 0), seqlen_q=4, page_size=3),
    CacheCase("bf16", head_dim=64, window=(30, 2), seqlen_q=4, causal=False),
    CacheCase("f16", head_dim=64, window=(0, 0), seqlen_q=4),
    CacheCase("bf16", head_dim=128, window=(64, 0), lengths=(1000, 3, 500), page_size=16),
    CacheCase(softcap=2.0, seqlen_q=4),
    CacheCase("bf16", head_dim=64, softcap=30.0, softmax_scale=0.7),
    CacheCase(softmax_scale=-0.3),
    CacheCase("f16", head_dim=64, softmax_scale=0.0),
    CacheCase(alibi="h", seqlen_q=4),
    CacheCase("bf16", head_dim=64, alibi="bh", lengths=(37, 0, 300)),
    CacheCase(sinks=True, lengths=(0, 5), append=False),
    CacheCase("bf16", head_dim=64, sinks=True, lengths=(0, 5), append=False),
    CacheCase("f16", head_dim=64, sinks=True, alibi="bh", softcap=20.0, window=(50, 0), page_size=16, seqlen_q=3),
    CacheCase(large=True),
    CacheCase("bf16", head_dim=64, large=True, page_size=16),
)
TREES = (
    CacheCase(tree="one", seqlen_q=7),
    CacheCase(tree="each", seqlen_q=7, page_size=3),
    CacheCase(tree="each", seqlen_q=7, causal=False, append=False, lengths=(37, 7, 4, 0)),
    CacheCase("bf16", head_dim=64, tree="each", seqlen_q=16, heads_q=8, lengths=(64, 3, 0)),
    CacheCase("f16", head_dim=128, tree="one", seqlen_q=33, page_size=16),
    CacheCase("bf16", head_dim=64, tree="one", seqlen_q=64, lengths=(200, 0), window=(40, 5), sinks=True),
    CacheCase("bf16", head_dim=64, tree="one", seqlen_q=65, lengths=(200, 10), append=False),
)
FLOAT8 = (
    CacheCase("f16", head_dim=64, float8=True),
    CacheCase("bf16", head_dim=64, float8=True, descale="h", seqlen_q=2),
    CacheCase("bf16", head_dim=128, float8=True, descale="bh", append=False, heads_q=8, lengths=(300, 17)),
    CacheCase("f16", head_dim=128, float8=True, descale="bh", page_size=16, rotary="halves"),
    CacheCase("bf16", head_dim=64, float8=True, descale="h", page_size=64, seqlen_q=33, window=(50, 0)),
    CacheCase("bf16", head_dim=40, float8=True, layout="gaps", sinks=True),
    CacheCase("f16", head_dim=256, float8=True, descale="h", tree="one", seqlen_q=5),
)
CASES = (*DTYPES, *LENGTHS, *QUERIES, *LAYOUTS, *PAGES, *HEADS, *HEAD_DIMS, *ROTARY, *SCORES, *TREES, *FLOAT8)
