// The gate: every argument check and workspace sizes of attention, forward and backward.
#include "flash_attention.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "error.h"
#include "gate.h"

static const char *const kImplNames[] = {"auto", "reference", "naive", "split", "fused", "tensor_core", "hopper"};
static const char *const kDtypeNames[] = {"float32", "float64", "float16", "bfloat16", "float8_e4m3fn"};
enum { kImplCount = 7, kDtypeCount = 4, kDtypeNameCount = 5, kDeviceCount = 2 }; // of inputs; with those of a cache

const char *fa_impl_name(fa_impl impl) { return (unsigned)impl < kImplCount ? kImplNames[impl] : "?"; }
const char *fa_dtype_name(fa_dtype dtype) { return (unsigned)dtype < kDtypeNameCount ? kDtypeNames[dtype] : "?"; }

fa_status fa_impl_parse(const char *name, fa_impl *impl) {
    FA_REQUIRE(name && impl, FA_ERROR_VALUE, "fa_impl_parse: name or impl is NULL");
    for (int i = 0; i < kImplCount; ++i)
        if (strcmp(kImplNames[i], name) == 0) {
            *impl = (fa_impl)i;
            return FA_OK;
        }
    return fa_fail(FA_ERROR_VALUE,
                   "impl '%s': must be one of auto, reference, naive, split, fused, tensor_core, hopper", name);
}

// ---- checks ---------------------------------------------------------------------------------------------------------

static const int64_t kMaxSize = INT32_MAX;

fa_status fa_check_size(const char *name, int64_t value, int64_t least, int64_t most) {
    FA_REQUIRE(value >= least && value <= most, FA_ERROR_VALUE, "%s %lld: must be between %lld and %lld", name,
               (long long)value, (long long)least, (long long)most);
    return FA_OK;
}

fa_status fa_check_heads(int64_t batch, int64_t heads_q, int64_t heads_kv, int64_t head_dim, int64_t head_dim_v) {
    FA_CHECK(fa_check_size("batch", batch, 0, kMaxSize));
    FA_CHECK(fa_check_size("heads_q", heads_q, 1, kMaxSize));
    FA_CHECK(fa_check_size("heads_kv", heads_kv, 1, kMaxSize));
    FA_REQUIRE(heads_q % heads_kv == 0, FA_ERROR_VALUE,
               "heads_q %lld, heads_kv %lld: the query heads must be a multiple of the key/value heads",
               (long long)heads_q, (long long)heads_kv);
    FA_REQUIRE(batch * heads_q <= UINT32_MAX, FA_ERROR_VALUE, "batch x heads_q %lld: must be below 2^32",
               (long long)(batch * heads_q));
    FA_CHECK(fa_check_size("head_dim", head_dim, 1, FA_MAX_HEAD_DIM));
    return fa_check_size("head_dim_v", head_dim_v, 1, FA_MAX_HEAD_DIM);
}

static fa_status check_sizes(const fa_forward_args *args) {
    FA_CHECK(fa_check_heads(args->batch, args->heads_q, args->heads_kv, args->head_dim, args->head_dim_v));
    FA_CHECK(fa_check_size("seqlen_q", args->seqlen_q, 0, kMaxSize));
    FA_CHECK(fa_check_size("seqlen_k", args->seqlen_k, 0, kMaxSize));
    // No byte count of any workspace may overflow: the largest is a few score matrices of doubles, or rows of head_dim.
    const double heads = (double)args->heads_q, padding = 256 * ((double)args->batch + 1);
    const double packed = args->cu_seqlens_q ? 1 : 0;
    const double rows_q = (double)args->batch * (double)args->seqlen_q + packed * (double)args->total_q + padding;
    const double rows_k = (double)args->batch * (double)args->seqlen_k + packed * (double)args->total_k + padding;
    FA_REQUIRE(heads * rows_q * ((double)args->seqlen_k + FA_MAX_HEAD_DIM) < 0x1p57 &&
                   heads * rows_k * FA_MAX_HEAD_DIM < 0x1p57,
               FA_ERROR_VALUE, "batch %lld, heads_q %lld, seqlen_q %lld, seqlen_k %lld: more than 2^57 scores",
               (long long)args->batch, (long long)args->heads_q, (long long)args->seqlen_q, (long long)args->seqlen_k);
    FA_CHECK(fa_check_size("workers.count", args->workers.count, 0, 1 << 16));
    return FA_OK;
}

fa_status fa_check_scores(fa_dtype dtype, double softmax_scale, double softcap, int causal, int64_t window_left,
                          int64_t window_right) {
    const double most = dtype == FA_FLOAT64 ? DBL_MAX : FLT_MAX; // the kernels' arithmetic
    const double least = dtype == FA_FLOAT64 ? DBL_MIN : FLT_MIN;
    const char *arithmetic = dtype == FA_FLOAT64 ? "float64" : "float32";
    FA_REQUIRE(fabs(softmax_scale) <= most, FA_ERROR_VALUE, "softmax_scale %g: must be finite in %s arithmetic",
               softmax_scale, arithmetic);
    FA_REQUIRE(softcap == 0 || (softcap >= least && softcap <= most), FA_ERROR_VALUE,
               "softcap %g: must be positive, finite and normal in %s arithmetic, or 0 for none", softcap, arithmetic);
    FA_REQUIRE(causal == 0 || causal == 1, FA_ERROR_VALUE, "causal %d: must be 0 or 1", causal);
    FA_REQUIRE(window_left >= -1 && window_right >= -1, FA_ERROR_VALUE,
               "window_size (%lld, %lld): each side must be >= 0, or -1 for unbounded", (long long)window_left,
               (long long)window_right);
    return FA_OK;
}

static fa_status check_options(const fa_forward_args *args) {
    FA_CHECK(fa_check_scores(args->dtype, args->softmax_scale, args->softcap, args->causal, args->window_left,
                             args->window_right));
    FA_REQUIRE(args->dropout_p >= 0 && args->dropout_p < 1, FA_ERROR_VALUE, "dropout_p %g: must be in [0, 1)",
               args->dropout_p);
    FA_REQUIRE((args->dropout_p > 0) == (args->dropout_seed != NULL), FA_ERROR_VALUE,
               "dropout_seed: must be given iff dropout_p > 0, which is %g", args->dropout_p);
    return FA_OK;
}

// The dtype of bias or sinks: the inputs', float32, or float64 with float64 inputs.
fa_status fa_check_companion(const char *name, fa_dtype dtype, fa_dtype inputs, int own_dtype) {
    const int allowed =
        dtype == FA_FLOAT32 || (own_dtype && dtype == inputs) || (dtype == FA_FLOAT64 && inputs == FA_FLOAT64);
    FA_REQUIRE(allowed, FA_ERROR_TYPE, "%s is %s: with %s inputs it must be float32%s%s", name, fa_dtype_name(dtype),
               fa_dtype_name(inputs), inputs != FA_FLOAT32 && (own_dtype || inputs == FA_FLOAT64) ? " or " : "",
               inputs != FA_FLOAT32 && (own_dtype || inputs == FA_FLOAT64) ? fa_dtype_name(inputs) : "");
    return FA_OK;
}

fa_status fa_check_per_head(const fa_per_head *alibi_slopes, const fa_per_head *sinks, fa_dtype inputs) {
    if (alibi_slopes->data) FA_CHECK(fa_check_companion("alibi_slopes", alibi_slopes->dtype, inputs, 0));
    if (!sinks->data) return FA_OK;
    FA_CHECK(fa_check_companion("sinks", sinks->dtype, inputs, 1));
    FA_REQUIRE(sinks->stride_b == 0, FA_ERROR_VALUE, "sinks: stride_b %lld must be 0, one sink a head",
               (long long)sinks->stride_b);
    return FA_OK;
}

static fa_status check_extras(const fa_forward_args *args) {
    if (args->bias.data) {
        FA_REQUIRE(!args->cu_seqlens_q, FA_ERROR_VALUE, "bias: packed sequences (cu_seqlens) take none");
        FA_CHECK(fa_check_companion("bias", args->bias.dtype, args->dtype, 1));
    }
    FA_CHECK(fa_check_per_head(&args->alibi_slopes, &args->sinks, args->dtype));
    const int packed_q = args->cu_seqlens_q != NULL, packed_k = args->cu_seqlens_k != NULL;
    FA_REQUIRE(packed_q == packed_k, FA_ERROR_VALUE, "cu_seqlens_q and cu_seqlens_k: give both or neither");
    FA_REQUIRE(!packed_q || (!args->seqlens_q && !args->seqlens_k), FA_ERROR_VALUE,
               "seqlens_q, seqlens_k: are for padded batches, not with cu_seqlens");
    if (packed_q) {
        FA_CHECK(fa_check_size("total_q", args->total_q, 0, kMaxSize));
        FA_CHECK(fa_check_size("total_k", args->total_k, 0, kMaxSize));
    }
    return FA_OK;
}

static fa_status check_seqlens(const char *name, const int32_t *seqlens, int64_t batch, int64_t limit) {
    for (int64_t b = 0; seqlens && b < batch; ++b)
        FA_REQUIRE(seqlens[b] >= 0 && seqlens[b] <= limit, FA_ERROR_VALUE,
                   "%s[%lld] = %d: must be between 0 and the tensor's %lld rows", name, (long long)b, (int)seqlens[b],
                   (long long)limit);
    return FA_OK;
}

static fa_status check_cu_seqlens(const char *name, const int32_t *cu_seqlens, int64_t batch, int64_t total,
                                  int64_t longest) {
    if (!cu_seqlens) return FA_OK;
    FA_REQUIRE(cu_seqlens[0] == 0, FA_ERROR_VALUE, "%s[0] = %d: must be 0", name, (int)cu_seqlens[0]);
    for (int64_t b = 0; b < batch; ++b) {
        const int64_t length = (int64_t)cu_seqlens[b + 1] - cu_seqlens[b];
        FA_REQUIRE(length >= 0, FA_ERROR_VALUE, "%s[%lld] = %d after %d: must not decrease", name, (long long)(b + 1),
                   (int)cu_seqlens[b + 1], (int)cu_seqlens[b]);
        FA_REQUIRE(cu_seqlens[b + 1] <= total, FA_ERROR_VALUE, "%s[%lld] = %d: ends beyond the tensor's %lld rows",
                   name, (long long)(b + 1), (int)cu_seqlens[b + 1], (long long)total);
        FA_REQUIRE(length <= longest, FA_ERROR_VALUE, "%s: sequence %lld has %lld rows, more than max_seqlen %lld",
                   name, (long long)b, (long long)length, (long long)longest);
    }
    return FA_OK;
}

fa_status fa_check_tensor(const char *name, const fa_tensor *t, int64_t rows) {
    FA_REQUIRE(t->data || rows == 0, FA_ERROR_VALUE, "%s: is NULL but has %lld rows", name, (long long)rows);
    return FA_OK;
}

static int64_t q_rows(const fa_forward_args *args) {
    return (args->cu_seqlens_q ? args->total_q : args->batch * args->seqlen_q) * args->heads_q;
}
static int64_t k_rows(const fa_forward_args *args) {
    return (args->cu_seqlens_k ? args->total_k : args->batch * args->seqlen_k) * args->heads_kv;
}

fa_status fa_check_target(fa_device device, fa_impl impl, fa_dtype dtype) {
    FA_REQUIRE((unsigned)device < kDeviceCount, FA_ERROR_VALUE, "device %d: must be FA_CPU or FA_CUDA", (int)device);
    FA_REQUIRE((unsigned)impl < kImplCount, FA_ERROR_VALUE, "impl %d: no such kernel", (int)impl);
    FA_REQUIRE((unsigned)dtype < kDtypeCount, FA_ERROR_TYPE, "dtype %d: must be float32, float64, float16 or bfloat16",
               (int)dtype);
    return device == FA_CPU && !fa_cpu_isa() ? FA_ERROR_VALUE : FA_OK; // its sentence names the variable
}

static fa_status check_request(const fa_forward_args *args) {
    FA_REQUIRE(args, FA_ERROR_VALUE, "args: is NULL");
    FA_CHECK(fa_check_target(args->device, args->impl, args->dtype));
    FA_CHECK(check_sizes(args));
    FA_CHECK(check_options(args));
    return check_extras(args);
}

static fa_status check_lengths(const fa_forward_args *args) {
    FA_CHECK(check_seqlens("seqlens_q", args->seqlens_q, args->batch, args->seqlen_q));
    FA_CHECK(check_seqlens("seqlens_k", args->seqlens_k, args->batch, args->seqlen_k));
    FA_CHECK(check_cu_seqlens("cu_seqlens_q", args->cu_seqlens_q, args->batch, args->total_q, args->seqlen_q));
    return check_cu_seqlens("cu_seqlens_k", args->cu_seqlens_k, args->batch, args->total_k, args->seqlen_k);
}

// What is behind the pointers; lengths are read where the host can.
static fa_status check_data(const fa_forward_args *args) {
    FA_CHECK(fa_check_tensor("q", &args->q, q_rows(args)));
    FA_CHECK(fa_check_tensor("k", &args->k, k_rows(args)));
    FA_CHECK(fa_check_tensor("v", &args->v, k_rows(args)));
    FA_CHECK(fa_check_tensor("o", &args->o, q_rows(args)));
    FA_CHECK(fa_check_tensor("lse", &args->lse, q_rows(args)));
    return args->device == FA_CPU ? check_lengths(args) : FA_OK;
}

static fa_status check_gradients(const fa_backward_args *args) {
    const fa_forward_args *forward = &args->forward;
    FA_REQUIRE(!args->d_bias.data || (forward->bias.data && args->d_bias.dtype == forward->bias.dtype), FA_ERROR_VALUE,
               "d_bias: needs a bias of the same dtype");
    FA_REQUIRE(!args->d_alibi_slopes.data ||
                   (forward->alibi_slopes.data && args->d_alibi_slopes.dtype == forward->alibi_slopes.dtype),
               FA_ERROR_VALUE, "d_alibi_slopes: needs alibi_slopes of the same dtype");
    FA_REQUIRE(!args->d_sinks.data || (forward->sinks.data && args->d_sinks.dtype == forward->sinks.dtype),
               FA_ERROR_VALUE, "d_sinks: needs sinks of the same dtype");
    FA_REQUIRE(args->d_sinks.stride_b == 0, FA_ERROR_VALUE, "d_sinks: stride_b %lld must be 0, one sink a head",
               (long long)args->d_sinks.stride_b);
    FA_REQUIRE(args->deterministic == 0 || args->deterministic == 1, FA_ERROR_VALUE, "deterministic %d: must be 0 or 1",
               (int)args->deterministic);
    return FA_OK;
}

static fa_status check_gradient_data(const fa_backward_args *args) {
    FA_CHECK(check_data(&args->forward));
    FA_CHECK(fa_check_tensor("d_o", &args->d_o, q_rows(&args->forward)));
    FA_CHECK(fa_check_tensor("d_q", &args->d_q, q_rows(&args->forward)));
    FA_CHECK(fa_check_tensor("d_k", &args->d_k, k_rows(&args->forward)));
    return fa_check_tensor("d_v", &args->d_v, k_rows(&args->forward));
}

fa_status fa_check_workspace(const void *workspace, size_t bytes, size_t needed_bytes) {
    FA_REQUIRE(needed_bytes == 0 || workspace, FA_ERROR_WORKSPACE, "workspace: is NULL, the call needs %zu bytes",
               needed_bytes);
    FA_REQUIRE((uintptr_t)workspace % FA_WORKSPACE_ALIGNMENT == 0, FA_ERROR_WORKSPACE,
               "workspace %p: must be aligned to %d bytes", workspace, FA_WORKSPACE_ALIGNMENT);
    FA_REQUIRE(bytes >= needed_bytes, FA_ERROR_WORKSPACE, "workspace: %zu bytes, the call needs %zu", bytes,
               needed_bytes);
    return FA_OK;
}
static fa_status check_workspace(const fa_forward_args *args, size_t needed_bytes) {
    return fa_check_workspace(args->workspace, args->workspace_bytes, needed_bytes);
}

// ---- entries ---------------------------------------------------------------------------------------------------------

// backward: NULL in the forward pass.
static fa_request request_of(const fa_forward_args *args, const fa_backward_args *backward) {
    return (fa_request){args->device, args->impl, args, backward, NULL};
}

static fa_status choose(const fa_forward_args *args, const fa_backward_args *backward, const fa_kernel **kernel) {
    const fa_request request = request_of(args, backward);
    return fa_choose(&request, kernel);
}

fa_status fa_kernel_verdict(int32_t index, const fa_forward_args *args, fa_pass pass, char *text, size_t size) {
    FA_CHECK(check_request(args));
    const fa_backward_args plain = {.forward = *args}; // the gradients of q, k and v
    const fa_request request = request_of(args, pass == FA_BACKWARD ? &plain : NULL);
    return fa_verdict(index, &request, text, size);
}

fa_status fa_check_lengths(const fa_forward_args *args) {
    FA_CHECK(check_request(args));
    return check_lengths(args);
}

fa_status fa_forward_workspace_bytes(const fa_forward_args *args, size_t *bytes) {
    const fa_kernel *kernel = NULL;
    FA_REQUIRE(bytes, FA_ERROR_VALUE, "bytes: is NULL");
    FA_CHECK(check_request(args));
    FA_CHECK(choose(args, NULL, &kernel));
    *bytes = kernel->forward_bytes(args);
    return FA_OK;
}

fa_status fa_forward(const fa_forward_args *args) {
    const fa_kernel *kernel = NULL;
    FA_CHECK(check_request(args));
    FA_CHECK(check_data(args));
    FA_CHECK(choose(args, NULL, &kernel));
    FA_CHECK(check_workspace(args, kernel->forward_bytes(args)));
    return kernel->forward(args);
}

fa_status fa_backward_workspace_bytes(const fa_backward_args *args, size_t *bytes) {
    const fa_kernel *kernel = NULL;
    FA_REQUIRE(args && bytes, FA_ERROR_VALUE, "args, bytes: one is NULL");
    FA_CHECK(check_request(&args->forward));
    FA_CHECK(check_gradients(args));
    FA_CHECK(choose(&args->forward, args, &kernel));
    *bytes = kernel->backward_bytes(args);
    return FA_OK;
}

fa_status fa_backward(const fa_backward_args *args) {
    const fa_kernel *kernel = NULL;
    FA_REQUIRE(args, FA_ERROR_VALUE, "args: is NULL");
    FA_CHECK(check_request(&args->forward));
    FA_CHECK(check_gradients(args));
    FA_CHECK(check_gradient_data(args));
    FA_CHECK(choose(&args->forward, args, &kernel));
    FA_CHECK(check_workspace(&args->forward, kernel->backward_bytes(args)));
    return kernel->backward(args);
}
