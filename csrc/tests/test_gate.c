// Every refusal: its status, its sentence, and nothing written.
#include <math.h>
#include <string.h>

#include "harness.h"
#include "flash_attention.h"

enum { kB = 2, kH = 4, kHkv = 2, kLq = 3, kLk = 5, kD = 8, kWorkspaceBytes = 1 << 20 };

static float g_in[kB * kH * kLk * kD], g_out[kB * kH * kLk * kD];
static _Alignas(FA_WORKSPACE_ALIGNMENT) char g_workspace[kWorkspaceBytes];
static const int64_t g_seed = 1;

static fa_tensor tensor(float *data, int64_t heads, int64_t rows, int64_t width) {
    return (fa_tensor){data, heads * rows * width, rows * width, width};
}

static fa_backward_args valid_args(void) {
    const fa_tensor q = tensor(g_in, kH, kLq, kD), k = tensor(g_in, kHkv, kLk, kD), lse = tensor(g_in, kH, kLq, 1);
    fa_forward_args forward = {.q = q, .k = k, .v = k, .o = q, .lse = lse, .softmax_scale = 0.3};
    forward.batch = kB, forward.heads_q = kH, forward.heads_kv = kHkv, forward.seqlen_q = kLq, forward.seqlen_k = kLk;
    forward.head_dim = forward.head_dim_v = kD, forward.window_left = forward.window_right = -1;
    forward.workspace = g_workspace, forward.workspace_bytes = sizeof g_workspace;
    const fa_tensor d_q = tensor(g_out, kH, kLq, kD), d_k = tensor(g_out, kHkv, kLk, kD);
    return (fa_backward_args){.forward = forward, .d_o = q, .d_q = d_q, .d_k = d_k, .d_v = d_k, .deterministic = 1};
}

// The forward arguments of valid_args(), writing to g_out.
static fa_forward_args valid_forward(void) {
    fa_forward_args args = valid_args().forward;
    args.o.data = g_out;
    args.lse.data = g_out;
    return args;
}

static void expect_refusal(fa_status got, fa_status wanted, const char *sentence) {
    expect(got == wanted, "status %d instead of %d (%s)", got, wanted, fa_error_text());
    expect(strstr(fa_error_text(), sentence) != NULL, "'%s' does not say '%s'", fa_error_text(), sentence);
    for (size_t i = 0; i < sizeof g_out / sizeof *g_out; ++i)
        if (!expect(g_out[i] == 12345, "wrote element %zu", i)) break;
}

static void prepare(const char *mutation) {
    test_begin("gate: %s", mutation);
    for (size_t i = 0; i < sizeof g_out / sizeof *g_out; ++i) g_out[i] = 12345, g_in[i] = 0.5F;
}

// Runs MUTATION on valid arguments; forward must then refuse with STATUS and a sentence that contains SENTENCE.
#define REFUSES(STATUS, SENTENCE, MUTATION)                                                                            \
    do {                                                                                                               \
        prepare(#MUTATION);                                                                                            \
        fa_forward_args args = valid_forward();                                                                        \
        MUTATION;                                                                                                      \
        expect_refusal(fa_forward(&args), STATUS, SENTENCE);                                                           \
    } while (0)
#define BACKWARD_REFUSES(STATUS, SENTENCE, MUTATION)                                                                   \
    do {                                                                                                               \
        prepare(#MUTATION);                                                                                            \
        fa_backward_args args = valid_args();                                                                          \
        MUTATION;                                                                                                      \
        expect_refusal(fa_backward(&args), STATUS, SENTENCE);                                                          \
    } while (0)

static void test_sizes(void) {
    REFUSES(FA_ERROR_VALUE, "batch -1", args.batch = -1);
    REFUSES(FA_ERROR_VALUE, "heads_q 0", args.heads_q = 0);
    REFUSES(FA_ERROR_VALUE, "heads_q 4, heads_kv 3", args.heads_kv = 3);
    REFUSES(FA_ERROR_VALUE, "heads_q 4, heads_kv 8", args.heads_kv = 8);
    REFUSES(FA_ERROR_VALUE, "seqlen_q -1", args.seqlen_q = -1);
    REFUSES(FA_ERROR_VALUE, "seqlen_k -7", args.seqlen_k = -7);
    REFUSES(FA_ERROR_VALUE, "seqlen_k 1099511627776", args.seqlen_k = INT64_C(1) << 40);
    REFUSES(FA_ERROR_VALUE, "head_dim 0", args.head_dim = 0);
    REFUSES(FA_ERROR_VALUE, "head_dim 513: must be between 1 and 512", args.head_dim = 513);
    REFUSES(FA_ERROR_VALUE, "head_dim_v 513", args.head_dim_v = 513);
    REFUSES(FA_ERROR_VALUE, "", (args.batch = args.heads_q = args.heads_kv = INT32_MAX));
    REFUSES(FA_ERROR_VALUE, "",
            (args.seqlen_q = args.seqlen_k = INT32_MAX, args.batch = 1 << 20, args.impl = FA_NAIVE));
}

static void test_options(void) {
    REFUSES(FA_ERROR_VALUE, "softmax_scale nan", args.softmax_scale = NAN);
    REFUSES(FA_ERROR_VALUE, "softmax_scale inf", args.softmax_scale = INFINITY);
    REFUSES(FA_ERROR_VALUE, "softcap -1", args.softcap = -1);
    REFUSES(FA_ERROR_VALUE, "softcap nan", args.softcap = NAN);
    REFUSES(FA_ERROR_VALUE, "causal 2", args.causal = 2);
    REFUSES(FA_ERROR_VALUE, "window_size (-2, 3)", (args.window_left = -2, args.window_right = 3));
    REFUSES(FA_ERROR_VALUE, "window_size (0, -9)", (args.window_left = 0, args.window_right = -9));
    REFUSES(FA_ERROR_VALUE, "dropout_p 1", (args.dropout_p = 1, args.dropout_seed = &g_seed));
    REFUSES(FA_ERROR_VALUE, "dropout_p -0.5", (args.dropout_p = -0.5, args.dropout_seed = &g_seed));
    REFUSES(FA_ERROR_VALUE, "dropout_p nan", (args.dropout_p = NAN, args.dropout_seed = &g_seed));
    REFUSES(FA_ERROR_VALUE, "dropout_seed", args.dropout_p = 0.5);
    REFUSES(FA_ERROR_TYPE, "dtype 4", args.dtype = (fa_dtype)4);
    REFUSES(FA_ERROR_VALUE, "device 9", args.device = (fa_device)9);
    REFUSES(FA_ERROR_VALUE, "impl 77", args.impl = (fa_impl)77);
    REFUSES(FA_ERROR_UNSUPPORTED, "hopper", args.impl = FA_HOPPER);
    fa_kernel_info fastest; // of all devices: CUDA's rows come first
    fa_kernel_describe(0, &fastest);
    if (fastest.device != FA_CUDA)
        REFUSES(FA_ERROR_UNSUPPORTED, "no kernel of this build serves tensors on cuda", args.device = FA_CUDA);
}

static void test_extras(void) {
    REFUSES(FA_ERROR_TYPE, "bias is float64", args.bias = ((fa_bias){g_in, FA_FLOAT64, 0, 0, 0, 0}));
    REFUSES(FA_ERROR_TYPE, "bias is bfloat16: with float16 inputs it must be float32 or float16",
            (args.dtype = FA_FLOAT16, args.bias = (fa_bias){g_in, FA_BFLOAT16, 0, 0, 0, 0}));
    REFUSES(FA_ERROR_TYPE, "alibi_slopes is float16",
            (args.dtype = FA_FLOAT16, args.alibi_slopes = (fa_per_head){g_in, FA_FLOAT16, 0, 1}));
    REFUSES(FA_ERROR_TYPE, "sinks is float16", args.sinks = ((fa_per_head){g_in, FA_FLOAT16, 0, 1}));
    REFUSES(FA_ERROR_VALUE, "sinks", args.sinks = ((fa_per_head){g_in, FA_FLOAT32, 4, 1}));
    REFUSES(FA_ERROR_VALUE, "q: is NULL but has 24 rows", args.q.data = NULL);
    REFUSES(FA_ERROR_VALUE, "v: is NULL but has 20 rows", args.v.data = NULL);
    REFUSES(FA_ERROR_VALUE, "lse: is NULL", args.lse.data = NULL);
}

static void test_lengths(void) {
    static const int32_t too_long[kB] = {3, 6}, negative[kB] = {-1, 2}, starts_late[kB + 1] = {1, 2, 3};
    static const int32_t decreases[kB + 1] = {0, 3, 2}, whole_q[kB + 1] = {0, 2, 5}, whole_k[kB + 1] = {0, 5, 8};
    REFUSES(FA_ERROR_VALUE, "seqlens_q[1] = 6", args.seqlens_q = too_long);
    REFUSES(FA_ERROR_VALUE, "seqlens_k[0] = -1", args.seqlens_k = negative);
    REFUSES(FA_ERROR_VALUE, "cu_seqlens", args.cu_seqlens_q = whole_q);
#define PACK(Q, K) (args.cu_seqlens_q = (Q), args.cu_seqlens_k = (K), args.total_q = 5, args.total_k = 8)
    REFUSES(FA_ERROR_VALUE, "cu_seqlens_q[0] = 1", PACK(starts_late, whole_k));
    REFUSES(FA_ERROR_VALUE, "cu_seqlens_k[2] = 2 after 3", PACK(whole_q, decreases));
    REFUSES(FA_ERROR_VALUE, "cu_seqlens_k[2] = 8: ends beyond", (PACK(whole_q, whole_k), args.total_k = 7));
    REFUSES(FA_ERROR_VALUE, "max_seqlen", (PACK(whole_q, whole_k), args.seqlen_q = 2));
    REFUSES(FA_ERROR_VALUE, "total_q -1", (PACK(whole_q, whole_k), args.total_q = -1));
    REFUSES(FA_ERROR_VALUE, "bias", (PACK(whole_q, whole_k), args.bias = (fa_bias){g_in, FA_FLOAT32, 0, 0, 0, 0}));
    REFUSES(FA_ERROR_VALUE, "seqlens_q", (PACK(whole_q, whole_k), args.seqlens_q = too_long));

    prepare("fa_check_lengths, for a GPU");
    fa_forward_args args = valid_forward();
    args.device = FA_CUDA;
    expect(fa_check_lengths(&args) == FA_OK, "%s", fa_error_text());
    args.seqlens_k = negative;
    expect_refusal(fa_check_lengths(&args), FA_ERROR_VALUE, "seqlens_k[0] = -1");
    args.seqlens_k = NULL;
    PACK(whole_q, whole_k);
    expect(fa_check_lengths(&args) == FA_OK, "%s", fa_error_text());
    PACK(whole_q, decreases);
    expect_refusal(fa_check_lengths(&args), FA_ERROR_VALUE, "cu_seqlens_k[2] = 2 after 3");
    expect_refusal(fa_check_lengths(NULL), FA_ERROR_VALUE, "args: is NULL");
#undef PACK
}

static void test_backward(void) {
    BACKWARD_REFUSES(FA_ERROR_VALUE, "head_dim 600", args.forward.head_dim = 600);
    BACKWARD_REFUSES(FA_ERROR_VALUE, "d_o: is NULL", args.d_o.data = NULL);
    BACKWARD_REFUSES(FA_ERROR_VALUE, "d_q: is NULL", args.d_q.data = NULL);
    BACKWARD_REFUSES(FA_ERROR_VALUE, "d_bias", args.d_bias = ((fa_bias){g_out, FA_FLOAT32, 0, 0, 0, 0}));
    BACKWARD_REFUSES(FA_ERROR_VALUE, "d_alibi_slopes", args.d_alibi_slopes = ((fa_per_head){g_out, FA_FLOAT32, 0, 1}));
    BACKWARD_REFUSES(FA_ERROR_VALUE, "d_sinks", args.d_sinks = ((fa_per_head){g_out, FA_FLOAT32, 0, 1}));
}

static void test_workspace(void) {
    for (fa_impl impl = FA_REFERENCE; impl <= FA_FUSED; ++impl) {
        if (impl == FA_SPLIT) continue;
        prepare(fa_impl_name(impl));
        fa_backward_args args = valid_args();
        fa_forward_args forward = valid_forward();
        size_t bytes = 0;
        forward.impl = args.forward.impl = impl;
        expect(fa_forward_workspace_bytes(&forward, &bytes) == FA_OK, "%s", fa_error_text());
        if (bytes > 0) {
            forward.workspace_bytes = bytes - 1;
            expect_refusal(fa_forward(&forward), FA_ERROR_WORKSPACE, "the call needs");
            forward.workspace_bytes = bytes;
            forward.workspace = g_workspace + FA_WORKSPACE_ALIGNMENT / 2;
            expect_refusal(fa_forward(&forward), FA_ERROR_WORKSPACE, "aligned to 64 bytes");
            forward.workspace = NULL;
            expect_refusal(fa_forward(&forward), FA_ERROR_WORKSPACE, "workspace: is NULL");
        }
        expect(fa_backward_workspace_bytes(&args, &bytes) == FA_OK, "%s", fa_error_text());
        args.forward.workspace_bytes = bytes - 1;
        expect_refusal(fa_backward(&args), FA_ERROR_WORKSPACE, "the call needs");
    }
}

// The row of a kernel in the table; -1: this build has none.
static int32_t row_of(fa_impl impl, fa_device device) {
    fa_kernel_info info;
    for (int32_t row = 0; fa_kernel_describe(row, &info) == FA_OK; ++row)
        if (info.impl == impl && info.device == device) return row;
    return -1;
}

static void expect_verdict(fa_impl impl, const fa_forward_args *args, const char *words) {
    char text[512] = "";
    expect(fa_kernel_verdict(row_of(impl, FA_CUDA), args, FA_FORWARD, text, sizeof text) == FA_OK, "%s",
           fa_error_text());
    expect(strstr(text, words) != NULL, "%s: '%s' does not say '%s'", fa_impl_name(impl), text, words);
}

// What tensor cores refuse, with its reason, and that auto then takes the general kernel. Nothing runs: no GPU is needed.
static void test_tensor_core(void) {
    enum { kWide = 264 };
    static const char kRows[] = "takes rows of whole 16 bytes, aligned to them";
    if (row_of(FA_TENSOR_CORE, FA_CUDA) < 0) return;
#define TENSOR_CORE(VERDICT, OF_FUSED, MUTATION)                                                                       \
    do {                                                                                                               \
        prepare("tensor_core, " #MUTATION);                                                                            \
        fa_forward_args args = valid_forward();                                                                        \
        args.device = FA_CUDA, args.dtype = FA_BFLOAT16;                                                               \
        args.q.data = args.k.data = args.v.data = args.o.data = g_workspace;                                           \
        MUTATION;                                                                                                      \
        expect_verdict(FA_TENSOR_CORE, &args, VERDICT);                                                                \
        expect_verdict(FA_FUSED, &args, OF_FUSED);                                                                     \
    } while (0)
#define REFUSED(REASON, MUTATION) TENSOR_CORE(REASON, "chosen", MUTATION)
#define SERVED(MUTATION) TENSOR_CORE("chosen", "slower", MUTATION)
    SERVED((void)args);
    SERVED(args.dtype = FA_FLOAT16);
    SERVED((args.softcap = 2, args.sinks = (fa_per_head){g_in, FA_FLOAT32, 0, 1}));
    SERVED((args.head_dim = 256, args.q.stride_l = args.k.stride_l = 256));
    SERVED((args.k.data = g_workspace + 16, args.k.stride_h = 0));
    SERVED(args.lse.data = (char *)g_out + 4);
    SERVED((args.batch = 1, args.q.stride_b = args.k.stride_b = 1)); // not used
    SERVED((args.heads_q = args.heads_kv = 1, args.q.stride_h = args.k.stride_h = 3));
    REFUSED("bfloat16, not float64", args.dtype = FA_FLOAT64);
    REFUSED("takes head_dim up to 256, not 264", (args.head_dim = kWide, args.q.stride_l = args.k.stride_l = kWide));
    REFUSED("takes head_dim up to 256, not 264", (args.head_dim_v = kWide, args.v.stride_l = args.o.stride_l = kWide));
    REFUSED(kRows, args.head_dim = 4);
    REFUSED(kRows, args.head_dim_v = 12);
    REFUSED(kRows, args.q.data = g_workspace + 2);
    REFUSED(kRows, args.k.data = g_workspace + 8);
    REFUSED(kRows, args.v.data = g_workspace + 4);
    REFUSED(kRows, args.o.data = g_workspace + 8);
    REFUSED(kRows, args.q.stride_l += 1);
    REFUSED(kRows, args.k.stride_h += 4);
    REFUSED(kRows, args.v.stride_b += 2);
    REFUSED(kRows, args.o.stride_l += 4);
    REFUSED("not float64; takes head_dim up to 256, not 300; takes rows of",
            (args.dtype = FA_FLOAT64, args.head_dim = 300, args.k.data = g_workspace + 8));

    prepare("tensor_core, named, unaligned");
    fa_forward_args args = valid_forward();
    size_t bytes = 0;
    args.device = FA_CUDA, args.dtype = FA_FLOAT16, args.impl = FA_TENSOR_CORE, args.q.data = g_workspace + 2;
    expect_refusal(fa_forward(&args), FA_ERROR_UNSUPPORTED, "impl 'tensor_core' cannot serve this request: takes rows");
    expect_refusal(fa_forward_workspace_bytes(&args, &bytes), FA_ERROR_UNSUPPORTED, kRows);
#undef SERVED
#undef REFUSED
#undef TENSOR_CORE
}

void test_gate(void) {
    test_sizes();
    test_options();
    test_extras();
    test_lengths();
    test_backward();
    test_workspace();
    test_tensor_core();
    prepare("NULL arguments");
    expect_refusal(fa_forward(NULL), FA_ERROR_VALUE, "args: is NULL");
    expect_refusal(fa_backward(NULL), FA_ERROR_VALUE, "args: is NULL");
    prepare("what is not refused");
    fa_forward_args forward = valid_forward();
    expect(fa_forward(&forward) == FA_OK, "%s", fa_error_text());
    fa_backward_args backward = valid_args();
    expect(fa_backward(&backward) == FA_OK, "%s", fa_error_text());
}
