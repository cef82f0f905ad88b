// FlashAttention: exact attention, forward and backward, without the seqlen_q x seqlen_k matrix in memory.
//
//   s_ij = softmax_scale * q_i.k_j                              offset = seqlen_k - seqlen_q
//   s_ij = softcap * tanh(s_ij / softcap)                       if softcap > 0
//   s_ij = s_ij + bias_ij - slope_h * |i + offset - j|
//   l_i  = sum_visible exp(s_ij - m_i) (+ exp(sink_h - m_i)),   P_ij = exp(s_ij - m_i) / l_i
//   o_i  = sum_j dropout(P)_ij v_j,                             lse_i = m_i + ln(l_i)
//
// Key j is visible to row i iff j < length of the sequence, j <= i + offset (causal),
// i + offset - window_left <= j <= i + offset + window_right. A row that sees no key has o = 0, lse = -inf (lse = sink with
// a sink). Query head h reads key/value head h / (heads_q / heads_kv).
//
// The caller owns all memory. The library never allocates, synchronises, prints, exits or keeps state; it is thread-safe.
// Names: B batch, Hq/Hkv heads, Lq/Lk lengths, D head_dim, Dv head_dim_v. Strides count elements; byte counts end in _bytes.
#ifndef FLASH_ATTENTION_H
#define FLASH_ATTENTION_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FA_VERSION "0.1.0"
#define FA_MAX_HEAD_DIM 512
#define FA_WORKSPACE_ALIGNMENT 64 // bytes

// Values of every enum are part of the ABI: they never change.
typedef enum fa_status {
    FA_OK = 0,
    FA_ERROR_VALUE = 1,       // an argument outside its allowed values
    FA_ERROR_TYPE = 2,        // a dtype that does not belong there
    FA_ERROR_UNSUPPORTED = 3, // the named kernel, or every kernel, refuses the request
    FA_ERROR_WORKSPACE = 4,   // workspace missing, misaligned or too small
    FA_ERROR_DEVICE = 5,      // the device refused a launch
} fa_status;

typedef enum fa_dtype {
    FA_FLOAT32 = 0,
    FA_FLOAT64 = 1,
    FA_FLOAT16 = 2,
    FA_BFLOAT16 = 3,
    FA_FLOAT8_E4M3 = 4, // finite, one NaN (OCP E4M3): of a key/value cache alone
} fa_dtype;
typedef enum fa_device { FA_CPU = 0, FA_CUDA = 1 } fa_device;
typedef enum fa_pass { FA_FORWARD = 0, FA_BACKWARD = 1 } fa_pass;
typedef enum fa_impl {
    FA_AUTO = 0, // the fastest that supports the request
    FA_REFERENCE = 1,
    FA_NAIVE = 2,
    FA_SPLIT = 3,
    FA_FUSED = 4,
    FA_TENSOR_CORE = 5,
    FA_HOPPER = 6,
} fa_impl;

// (B, H, L, D) with the last axis contiguous. Packed sequences (cu_seqlens) have no batch axis: stride_b is not read.
typedef struct fa_tensor {
    void *data;
    int64_t stride_b, stride_h, stride_l;
} fa_tensor;

// (B, Hq, Lq, Lk). A stride of 0 broadcasts; in a gradient, a stride of 0 sums over that axis. data NULL: absent.
typedef struct fa_bias {
    void *data;
    fa_dtype dtype; // the inputs' dtype, float32, or float64 with float64 inputs
    int64_t stride_b, stride_h, stride_q, stride_k;
} fa_bias;

// (B, Hq); stride_b = 0 for one value a head. data NULL: absent.
typedef struct fa_per_head {
    void *data;
    fa_dtype dtype; // as fa_bias
    int64_t stride_b, stride_h;
} fa_per_head;

// The CPU threads that a call may use. run() calls body(arg, worker) once for each worker in [0, count), concurrently or
// not, and returns when all have returned. A zeroed struct: the calling thread alone.
typedef struct fa_workers {
    int32_t count;
    void (*run)(void *context, void (*body)(void *arg, int32_t worker), void *arg);
    void *context; // handed to run()
} fa_workers;

// Workers for a caller without a thread pool of its own: each run() starts count - 1 POSIX threads and joins them.
fa_workers fa_posix_workers(int32_t count);

typedef struct fa_forward_args {
    fa_device device;
    fa_impl impl;
    fa_dtype dtype;                    // of q, k, v, o and their gradients
    int64_t batch, heads_q, heads_kv;  // heads_q is a multiple of heads_kv
    int64_t seqlen_q, seqlen_k;        // Lq, Lk; with cu_seqlens: at least the longest sequence
    int64_t head_dim, head_dim_v;      // D of q and k, Dv of v and o: 1 ... FA_MAX_HEAD_DIM
    fa_tensor q, k, v;                 // (B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv)
    fa_tensor o;                       // (B, Hq, Lq, Dv): written by forward, read by backward
    fa_tensor lse;                     // (B, Hq, Lq), float32 (float64 with float64 inputs), natural log: as o
    double softmax_scale;              // usually D^-1/2
    double softcap;                    // 0: none
    int32_t causal;                    // 0 or 1; bottom-right aligned
    int64_t window_left, window_right; // keys to either side of i + offset; -1: unbounded
    fa_bias bias;                      // not with cu_seqlens
    fa_per_head alibi_slopes;          // float32, or float64 with float64 inputs
    fa_per_head sinks;                 // stride_b = 0
    double dropout_p;                  // in [0, 1)
    const int64_t *dropout_seed;       // one element on the device, read by the kernel; NULL iff dropout_p = 0
    uint32_t dropout_offset;           // tells apart calls that share a seed
    // Lengths that lie on a GPU are cut to the tensors by the kernels; rows that are cut off are not written.
    const int32_t *seqlens_q, *seqlens_k;       // (B,) on the device, or NULL: lengths of right-padded sequences
    const int32_t *cu_seqlens_q, *cu_seqlens_k; // (B+1,) on the device, or NULL: sequence b is rows [cu[b], cu[b+1])
    int64_t total_q, total_k;                   // rows of packed q and k; read only with cu_seqlens
    void *workspace; // fa_*_workspace_bytes(), aligned to FA_WORKSPACE_ALIGNMENT; NULL if that is 0
    size_t workspace_bytes;
    fa_workers workers; // CPU
    void *stream;       // CUDA: cudaStream_t
} fa_forward_args;

// Gradients. forward holds what the forward call was given and what it wrote (o, lse); its workspace is the backward's.
typedef struct fa_backward_args {
    fa_forward_args forward;
    fa_tensor d_o;              // (B, Hq, Lq, Dv)
    fa_tensor d_lse;            // (B, Hq, Lq) in lse's dtype; data NULL: zero
    fa_tensor d_q, d_k, d_v;    // written; shapes of q, k, v
    fa_bias d_bias;             // written in the dtype of bias; data NULL: not wanted
    fa_per_head d_alibi_slopes; // written in the dtype of alibi_slopes; stride_b = 0 sums over B; data NULL: not wanted
    fa_per_head d_sinks;        // written in the dtype of sinks, summed over B; data NULL: not wanted
    int32_t deterministic;      // 1: the same inputs give the same bits on every run (on the CPU they always do)
} fa_backward_args;

// Scratch that the call needs. No pointer is followed, but as some kernels need aligned rows, it depends not only on shape,
// options and worker count, but on strides and addresses, too: on which are NULL, and on what the others are aligned to.
fa_status fa_forward_workspace_bytes(const fa_forward_args *args, size_t *bytes);
fa_status fa_backward_workspace_bytes(const fa_backward_args *args, size_t *bytes);

// Refuses lengths that are negative, decrease or reach beyond the tensors. fa_forward and fa_backward do so themselves on
// FA_CPU; on FA_CUDA, where lengths are never read by the host, kernels cut them to the tensors instead. Here seqlens_* and
// cu_seqlens_* point to host memory, for either device; no other pointer is followed.
fa_status fa_check_lengths(const fa_forward_args *args);

fa_status fa_forward(const fa_forward_args *args);
fa_status fa_backward(const fa_backward_args *args);

// ---- key/value cache -------------------------------------------------------------------------------------------------
//
// Attention of Lq new tokens a sequence over a cache of keys and values, which first takes those of the new tokens. A cache
// is made of pages: token t of sequence b is row t % page_size of page page_table[b][t / page_size]. A contiguous cache
// (B', Hkv, Lmax, D) is B' pages of page_size = Lmax, max_pages = 1, and a page_table of one column says which of them is
// b's (NULL: page b).
//
//   k given:  start_b = cache_seqlens[b];       k, v are stored as tokens start_b + i;   len_k = start_b + Lq
//   else:     start_b = cache_seqlens[b] - Lq;                                           len_k = cache_seqlens[b]
//
// Row i of q stands at position start_b + i; masks, scores, o and lse are those of fa_forward with this len_k. Where a key
// of position p >= start_b is new token p - start_b, tree_mask says whether row i sees it, instead of causal; older ones are
// seen whatever causal says.
typedef struct fa_rotary {  // cos NULL: none. Rotates pairs of q and of k by their position, before they are stored
    const void *cos, *sin;  // (positions, dim / 2), contiguous
    fa_dtype dtype;         // dtype of q, or float32
    int64_t positions, dim; // dim: even, the first elements of a row of head_dim that are rotated
    int32_t interleaved;    // 1: pairs (2i, 2i + 1); 0: pairs (i, i + dim / 2)
} fa_rotary;

typedef struct fa_kvcache_args {
    fa_device device;
    fa_impl impl;
    fa_dtype dtype;                   // of q, k, v, o
    fa_dtype cache_dtype;             // dtype, or FA_FLOAT8_E4M3 with a 16-bit dtype
    int64_t batch, heads_q, heads_kv; // heads_q is a multiple of heads_kv
    int64_t seqlen_q;                 // Lq
    int64_t head_dim, head_dim_v;     // 1 ... FA_MAX_HEAD_DIM
    int64_t pages, page_size;         // of the caches
    int64_t max_pages;                // columns of page_table: a sequence has at most max_pages * page_size tokens
    fa_tensor q;                      // (B, Hq, Lq, D)
    fa_tensor k, v;                   // (B, Hkv, Lq, D), (B, Hkv, Lq, Dv): new tokens; data NULL: none
    fa_tensor k_cache,
        v_cache;      // (pages, Hkv, page_size, D), (.., Dv): read, and written if k is given; no two sequences
                      // may store to one row
    fa_tensor o, lse; // (B, Hq, Lq, Dv), (B, Hq, Lq) as fa_forward_args; lse's data NULL: not wanted
    // On a GPU lengths and pages are read by the kernels alone: a length is cut to what the pages hold, a page that does not
    // exist is neither read (its keys and values are 0) nor written.
    const int32_t *cache_seqlens; // (B,) on the device
    const int32_t
        *page_table; // (B, max_pages) on the device, rows page_table_stride apart; NULL: max_pages = 1, page b
    int64_t page_table_stride;
    fa_rotary rotary;                  // needs k
    double softmax_scale, softcap;     // as fa_forward_args
    int32_t causal;                    // 0 or 1
    int64_t window_left, window_right; // -1: unbounded
    fa_per_head alibi_slopes, sinks;   // as fa_forward_args
    fa_per_head k_descale, v_descale; // (B, Hkv) float32, stride_b = 0 for one a head: a cached element times it is the
                                      // value; data NULL: 1; only with FA_FLOAT8_E4M3
    const uint8_t *tree_mask;         // (B, Lq, Lq) of 0 and 1, rows Lq apart; NULL: none
    int64_t tree_mask_stride_b;       // 0: one for all sequences
    int64_t num_splits; // pieces that a sequence's keys are cut into; 0: as many as keep the device busy. No
                        // result depends on it
    void *workspace;    // fa_kvcache_workspace_bytes(), aligned to FA_WORKSPACE_ALIGNMENT; NULL if that is 0
    size_t workspace_bytes;
    fa_workers workers; // CPU
    void *stream;       // CUDA: cudaStream_t
} fa_kvcache_args;

// No pointer is followed; depends on shapes, options, strides, alignments and worker count, and on no length.
fa_status fa_kvcache_workspace_bytes(const fa_kvcache_args *args, size_t *bytes);
fa_status fa_kvcache_forward(const fa_kvcache_args *args);
// Refuses lengths that are negative or beyond the pages, and pages that do not exist. fa_kvcache_forward does so itself on
// FA_CPU, before anything is written. cache_seqlens and page_table point to host memory, for either device; no other pointer
// is followed.
fa_status fa_kvcache_check(const fa_kvcache_args *args);
// As fa_kernel_verdict.
fa_status fa_kvcache_verdict(int32_t index, const fa_kvcache_args *args, char *text, size_t size);

// One clear sentence about the last failure on this thread: the value got and the values allowed. "" before any.
const char *fa_error_text(void);

// The kernels of this build, fastest first. index in [0, fa_kernel_count()).
typedef struct fa_kernel_info {
    fa_impl impl;
    fa_device device;
    const char *name; // "fused"
} fa_kernel_info;
int32_t fa_kernel_count(void);
fa_status fa_kernel_describe(int32_t index, fa_kernel_info *info);
// Writes what fa_forward (or fa_backward) would do with kernel `index`: "chosen", "slower", or every reason for refusing.
// size: of text, in bytes; a longer text is cut. No pointer is followed, but what an address is aligned to counts.
fa_status fa_kernel_verdict(int32_t index, const fa_forward_args *args, fa_pass pass, char *text, size_t size);

// Names, for tables and messages. parse: FA_ERROR_VALUE for a name that is none.
const char *fa_impl_name(fa_impl impl);
const char *fa_dtype_name(fa_dtype dtype);
fa_status fa_impl_parse(const char *name, fa_impl *impl);

// The CPU instruction set in use: "scalar", "avx2", "avx512", "avx512_bf16". Chosen once from what the machine has; the
// environment variable FLASH_ATTENTION_ISA may name a lower one. NULL, with fa_error_text(), if it names none or a higher one.
const char *fa_cpu_isa(void);

#ifdef __cplusplus
}
#endif
#endif
