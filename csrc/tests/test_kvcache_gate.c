// Every refusal of attention over a cache: its status, its sentence, and nothing written.
#include <math.h>
#include <string.h>

#include "flash_attention.h"
#include "harness.h"

enum { kB = 2, kH = 4, kHkv = 2, kLq = 2, kD = 8, kPages = 5, kPageSize = 4, kColumns = 2, kElements = 1024 };

static float g_in[kElements], g_out[kElements], g_k_cache[kElements], g_v_cache[kElements];
static _Alignas(FA_WORKSPACE_ALIGNMENT) char g_workspace[1 << 16];
static int32_t g_lengths[kB], g_table[kB * kColumns];

static fa_tensor tensor(float *data, int64_t heads, int64_t rows) {
    return (fa_tensor){data, heads * rows * kD, rows * kD, kD};
}

static fa_kvcache_args valid_args(void) {
    fa_kvcache_args args = {.batch = kB, .heads_q = kH, .heads_kv = kHkv, .seqlen_q = kLq, .pages = kPages};
    args.head_dim = args.head_dim_v = kD, args.page_size = kPageSize, args.max_pages = kColumns;
    args.q = tensor(g_in, kH, kLq), args.k = args.v = tensor(g_in, kHkv, kLq);
    args.k_cache = tensor(g_k_cache, kHkv, kPageSize), args.v_cache = tensor(g_v_cache, kHkv, kPageSize);
    args.o = tensor(g_out, kH, kLq), args.cache_seqlens = g_lengths;
    args.page_table = g_table, args.page_table_stride = kColumns;
    args.softmax_scale = 0.3, args.window_left = args.window_right = -1;
    args.workspace = g_workspace, args.workspace_bytes = sizeof g_workspace;
    return args;
}

static void prepare(const char *mutation) {
    test_begin("gate of the cache: %s", mutation);
    for (int i = 0; i < kElements; ++i) g_out[i] = g_k_cache[i] = g_v_cache[i] = 12345, g_in[i] = 0.5F;
    g_lengths[0] = 3, g_lengths[1] = 6; // and 2 new tokens: two pages each, both full at the end of the second
    for (int i = 0; i < kB * kColumns; ++i) g_table[i] = kPages - 1 - i;
}

static void expect_refusal(fa_status got, fa_status wanted, const char *sentence) {
    expect(got == wanted, "status %d instead of %d (%s)", got, wanted, fa_error_text());
    expect(strstr(fa_error_text(), sentence) != NULL, "'%s' does not say '%s'", fa_error_text(), sentence);
    for (int i = 0; i < kElements; ++i)
        if (!expect(g_out[i] == 12345 && g_k_cache[i] == 12345 && g_v_cache[i] == 12345, "wrote element %d", i)) break;
}

// Runs MUTATION on valid arguments, which must then be refused with STATUS and a sentence that contains SENTENCE.
#define REFUSES(STATUS, SENTENCE, MUTATION)                                                                            \
    do {                                                                                                               \
        prepare(#MUTATION);                                                                                            \
        fa_kvcache_args args = valid_args();                                                                           \
        MUTATION;                                                                                                      \
        expect_refusal(fa_kvcache_forward(&args), STATUS, SENTENCE);                                                   \
    } while (0)
#define VALUE(SENTENCE, MUTATION) REFUSES(FA_ERROR_VALUE, SENTENCE, MUTATION)

static void test_sizes(void) {
    VALUE("batch -1", args.batch = -1);
    VALUE("heads_q 4, heads_kv 3", args.heads_kv = 3);
    VALUE("head_dim 513", args.head_dim = 513);
    VALUE("head_dim_v 0", args.head_dim_v = 0);
    VALUE("seqlen_q -1", args.seqlen_q = -1);
    VALUE("pages -1", args.pages = -1);
    VALUE("page_size -4", args.page_size = -4);
    VALUE("max_pages -1", args.max_pages = -1);
    VALUE("max_pages x page_size", (args.max_pages = 1 << 20, args.page_size = 1 << 20));
    VALUE("partial rows", (args.batch = 1 << 20, args.seqlen_q = 1 << 30));
    VALUE("k_cache has 1 entries", (args.page_table = NULL, args.max_pages = 1, args.pages = 1));
    VALUE("k_cache has 5 entries", args.page_table = NULL);
    VALUE("softmax_scale nan", args.softmax_scale = NAN);
    VALUE("softcap -1", args.softcap = -1);
    VALUE("window_size (-2, 3)", (args.window_left = -2, args.window_right = 3));
    VALUE("num_splits -1", args.num_splits = -1);
    VALUE("num_splits 1025", args.num_splits = 1025);
    VALUE("workers.count -1", args.workers.count = -1);
}

static void test_tensors(void) {
    VALUE("q: is NULL", args.q.data = NULL);
    VALUE("o: is NULL", args.o.data = NULL);
    VALUE("k_cache: is NULL", args.k_cache.data = NULL);
    VALUE("v_cache: is NULL", args.v_cache.data = NULL);
    VALUE("k and v: give both", args.k.data = NULL);
    VALUE("k and v: give both", args.v.data = NULL);
    VALUE("cache_seqlens: is NULL", args.cache_seqlens = NULL);
    REFUSES(FA_ERROR_TYPE, "dtype 4", args.dtype = FA_FLOAT8_E4M3);
    REFUSES(FA_ERROR_TYPE, "k_cache is float16 and q is float32", args.cache_dtype = FA_FLOAT16);
    REFUSES(FA_ERROR_TYPE, "k_cache is float8_e4m3fn and q is float32", args.cache_dtype = FA_FLOAT8_E4M3);
    REFUSES(FA_ERROR_TYPE, "sinks is float16", args.sinks = ((fa_per_head){g_in, FA_FLOAT16, 0, 1}));
    REFUSES(FA_ERROR_TYPE, "alibi_slopes is float64", args.alibi_slopes = ((fa_per_head){g_in, FA_FLOAT64, 0, 1}));
    VALUE("k_descale: is for float8_e4m3fn", args.k_descale = ((fa_per_head){g_in, FA_FLOAT32, 0, 1}));
    REFUSES(FA_ERROR_TYPE, "v_descale is float16",
            (args.dtype = FA_FLOAT16, args.cache_dtype = FA_FLOAT8_E4M3,
             args.v_descale = (fa_per_head){g_in, FA_FLOAT16, 0, 1}));
}

static void test_rotary(void) {
    static const fa_rotary kValid = {g_in, g_in, FA_FLOAT32, kColumns * kPageSize, 4, 0};
    VALUE("rotary_cos and rotary_sin: give both", (args.rotary = kValid, args.rotary.sin = NULL));
    VALUE("need k", (args.rotary = kValid, args.k.data = args.v.data = NULL));
    VALUE("rotary_dim 3", (args.rotary = kValid, args.rotary.dim = 3));
    VALUE("rotary_dim 10", (args.rotary = kValid, args.rotary.dim = 10));
    VALUE("rotary_dim 0", (args.rotary = kValid, args.rotary.dim = 0));
    VALUE("rotary_interleaved 2", (args.rotary = kValid, args.rotary.interleaved = 2));
    VALUE("rotary_cos has 7 positions", (args.rotary = kValid, args.rotary.positions = 7));
    REFUSES(FA_ERROR_TYPE, "rotary_cos is bfloat16", (args.rotary = kValid, args.rotary.dtype = FA_BFLOAT16));
}

static void test_lengths(void) {
    VALUE("cache_seqlens[1] = -1", g_lengths[1] = -1);
    VALUE("cache_seqlens[0] = 9: must be between 0 and the 8 tokens", g_lengths[0] = 9);
    VALUE("cache_seqlens[1] = 7 and 2 new tokens", g_lengths[1] = 7);
    VALUE("page_table (cache_batch_idx) of sequence 1: page 1 is 5", g_table[3] = kPages);
    VALUE("page_table (cache_batch_idx) of sequence 0: page 1 is -1", g_table[1] = -1); // of new tokens alone

    prepare("fa_kvcache_check, for a GPU");
    fa_kvcache_args args = valid_args();
    args.device = FA_CUDA;
    expect(fa_kvcache_check(&args) == FA_OK, "%s", fa_error_text());
    g_table[0] = kPages;
    expect_refusal(fa_kvcache_check(&args), FA_ERROR_VALUE, "page 0 is 5");
    expect_refusal(fa_kvcache_check(NULL), FA_ERROR_VALUE, "args: is NULL");
}

static void test_kernels(void) {
    REFUSES(FA_ERROR_UNSUPPORTED, "'naive' cannot serve this request: has no attention over a cache",
            args.impl = FA_NAIVE);
    for (int32_t row = 0; row < fa_kernel_count(); ++row) {
        fa_kernel_info kernel;
        char text[512] = "";
        fa_kernel_describe(row, &kernel);
        if (kernel.device != FA_CPU) continue;
        prepare(kernel.name);
        fa_kvcache_args args = valid_args();
        expect(fa_kvcache_verdict(row, &args, text, sizeof text) == FA_OK, "%s", fa_error_text());
        const char *wanted = kernel.impl == FA_FUSED   ? "chosen"
                             : kernel.impl == FA_NAIVE ? "has no attention over a cache"
                                                       : "slower";
        expect(strcmp(text, wanted) == 0, "'%s' instead of '%s'", text, wanted);
        args.impl = kernel.impl;
        size_t bytes = 0;
        if (fa_kvcache_workspace_bytes(&args, &bytes) != FA_OK) continue;
        args.workspace_bytes = bytes - 1;
        expect_refusal(fa_kvcache_forward(&args), FA_ERROR_WORKSPACE, "the call needs");
        args.workspace_bytes = bytes, args.workspace = g_workspace + FA_WORKSPACE_ALIGNMENT / 2;
        expect_refusal(fa_kvcache_forward(&args), FA_ERROR_WORKSPACE, "aligned to 64 bytes");
        args.workspace = NULL;
        expect_refusal(fa_kvcache_forward(&args), FA_ERROR_WORKSPACE, "workspace: is NULL");
    }
}

// A workspace is bounded by rows of queries, not by what a cache may hold.
static void test_workspace(void) {
    test_begin("gate of the cache: workspace of a million tokens");
    fa_kvcache_args args = valid_args();
    size_t bytes = 0;
    args.pages = args.max_pages = 1 << 16, args.page_size = 16, args.head_dim = args.head_dim_v = 128;
    expect(fa_kvcache_workspace_bytes(&args, &bytes) == FA_OK, "%s", fa_error_text());
    expect(bytes < 8 << 20, "%zu bytes", bytes);
}

void test_kvcache_gate(void) {
    test_sizes();
    test_tensors();
    test_rotary();
    test_lengths();
    test_kernels();
    test_workspace();
    prepare("NULL arguments");
    expect_refusal(fa_kvcache_forward(NULL), FA_ERROR_VALUE, "args: is NULL");
    prepare("what is not refused");
    fa_kvcache_args args = valid_args();
    g_table[0] = g_table[1], g_lengths[0] = 0; // a page of another column; -1 where no token is
    g_table[1] = -1;
    expect(fa_kvcache_forward(&args) == FA_OK, "%s", fa_error_text());
}
