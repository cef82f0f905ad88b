// As request.h, of the op over a key/value cache: tensors in, fa_kvcache_args out.
#ifndef FA_BINDINGS_KVCACHE_REQUEST_H
#define FA_BINDINGS_KVCACHE_REQUEST_H

#include <ATen/MemoryOverlap.h>

#include "bindings/tensors.h"

namespace fa {

// cache_a, cache_b, out: the types of these, which only the op that computes writes.
#define FA_KVCACHE_REQUEST(cache_a, cache_b, out)                                                                      \
    "Tensor q, " cache_a " k_cache, " cache_b " v_cache, Tensor? k, Tensor? v, Tensor cache_seqlens, "                 \
    "Tensor? page_table, Tensor? cache_batch_idx, Tensor? rotary_cos, Tensor? rotary_sin, Tensor? alibi_slopes, "      \
    "Tensor? sinks, Tensor? tree_mask, Tensor? k_descale, Tensor? v_descale, " out " out, "                            \
    "bool rotary_interleaved, bool causal, float? softmax_scale, SymInt window_left, SymInt window_right, "            \
    "float softcap, SymInt num_splits, bool return_lse, str impl"
#define FA_KVCACHE_KINDS "tttTTtTTTTTTTTTTbbFiifibs" // as FA_REQUEST_KINDS
enum { kKvcacheSize = sizeof FA_KVCACHE_KINDS - 1, kKvcacheTensors = 16 };
enum { kKvcacheQ, kKvcacheKCache, kKvcacheVCache, kKvcacheK, kKvcacheV, kKvcacheOut = kKvcacheTensors - 1 }; // places

// The arguments of FA_KVCACHE_REQUEST, from stack position `first` on, where they stay. While it lives, q's GPU is the
// current one.
struct KvcacheRequest {
    const Tensor *q, *k_cache, *v_cache, *k, *v, *cache_seqlens, *page_table, *cache_batch_idx, *rotary_cos,
        *rotary_sin, *alibi_slopes, *sinks, *tree_mask, *k_descale, *v_descale, *out; // nullptr: None
    bool return_lse;
    fa_kvcache_args args{};
    c10::OptionalDeviceGuard device_guard;

    KvcacheRequest(const Stack &stack, size_t first) {
        static const char *const names[kKvcacheTensors] = {
            "q",          "k_cache",       "v_cache",      "k",
            "v",          "cache_seqlens", "page_table",   "cache_batch_idx",
            "rotary_cos", "rotary_sin",    "alibi_slopes", "sinks",
            "tree_mask",  "k_descale",     "v_descale",    "out"};
        const Tensor **const tensors[kKvcacheTensors] = {
            &q,          &k_cache,    &v_cache,      &k,     &v,         &cache_seqlens, &page_table, &cache_batch_idx,
            &rotary_cos, &rotary_sin, &alibi_slopes, &sinks, &tree_mask, &k_descale,     &v_descale,  &out};
        for (size_t i = 0; i < kKvcacheTensors; ++i) {
            const c10::IValue &value = stack[first + i];
            *tensors[i] = value.isTensor() ? &value.toTensor() : nullptr;
            if (*tensors[i]) check_same_device(names[i], **tensors[i], *q);
        }
        const c10::IValue *values = &stack[first + kKvcacheTensors];
        args.rotary.interleaved = values[0].toBool(), args.causal = values[1].toBool();
        args.window_left = values[3].toInt(), args.window_right = values[4].toInt();
        args.softcap = values[5].toDouble(), args.num_splits = values[6].toInt(), return_lse = values[7].toBool();
        check(fa_impl_parse(values[8].toStringRef().c_str(), &args.impl));
        read_tensors();
        args.softmax_scale =
            values[2].isNone() ? 1 / std::sqrt(static_cast<double>(args.head_dim)) : values[2].toDouble();
        read_pages();
        read_companions();
        read_out();
        if (args.device == FA_CPU)
            args.workers = torch_workers(multiplications());
        else
            args.stream = enter_device(*q, device_guard);
    }

    void read_tensors() {
        args.device = q->is_cuda() ? FA_CUDA : FA_CPU;
        args.dtype = dtype_of("q", *q);
        const bool is_float8 = k_cache->scalar_type() == at::kFloat8_e4m3fn;
        TORCH_CHECK_TYPE(is_float8 || k_cache->scalar_type() == q->scalar_type(), "k_cache is ", k_cache->scalar_type(),
                         " and q is ", q->scalar_type(),
                         ": they must have one dtype, or a float16 or bfloat16 q a float8_e4m3fn cache");
        TORCH_CHECK_TYPE(v_cache->scalar_type() == k_cache->scalar_type(), "v_cache is ", v_cache->scalar_type(),
                         " and k_cache is ", k_cache->scalar_type(), ": the caches must have one dtype");
        args.cache_dtype = is_float8 ? FA_FLOAT8_E4M3 : args.dtype;
        args.q = tensor_of("q", *q, false);
        args.k_cache = tensor_of("k_cache", *k_cache, false), args.v_cache = tensor_of("v_cache", *v_cache, false);
        args.batch = q->size(0), args.heads_q = q->size(1), args.seqlen_q = q->size(2), args.head_dim = q->size(3);
        args.pages = k_cache->size(0), args.heads_kv = k_cache->size(1), args.page_size = k_cache->size(2);
        args.head_dim_v = v_cache->size(3);
        check_shape("k_cache", *k_cache, "(B' or pages, Hkv, Lmax or page_size, D)",
                    {args.pages, args.heads_kv, args.page_size, args.head_dim});
        check_shape("v_cache", *v_cache, "(B' or pages, Hkv, Lmax or page_size, Dv)",
                    {args.pages, args.heads_kv, args.page_size, args.head_dim_v});
        const auto new_tokens = [&](const char *name, const Tensor &t, const char *shape, int64_t width) {
            TORCH_CHECK_TYPE(t.scalar_type() == q->scalar_type(), name, " is ", t.scalar_type(), " and q is ",
                             q->scalar_type(), ": q, k and v must have one dtype");
            fa_tensor tensor = tensor_of(name, t, false);
            check_shape(name, t, shape, {args.batch, args.heads_kv, args.seqlen_q, width});
            tensor.data = data_or_nothing(t);
            return tensor;
        };
        if (k) args.k = new_tokens("k", *k, "(B, Hkv, Lq, D)", args.head_dim);
        if (v) args.v = new_tokens("v", *v, "(B, Hkv, Lq, Dv)", args.head_dim_v);
        if (k) check_each_row_is_its_own("k_cache", *k_cache);
        if (v) check_each_row_is_its_own("v_cache", *v_cache);
        args.cache_seqlens = lengths_of("cache_seqlens", *cache_seqlens, args.batch);
    }

    // Of what is written.
    static void check_each_row_is_its_own(const char *name, const Tensor &t) {
        TORCH_CHECK_VALUE(at::has_internal_overlap(t) != at::MemOverlap::Yes, name, " has strides ", text(t.strides()),
                          ": what is written must not share memory with itself; call .contiguous()");
    }

    void read_pages() {
        TORCH_CHECK_VALUE(!page_table || !cache_batch_idx,
                          "page_table and cache_batch_idx: give one of them, or neither");
        const auto integers = [&](const char *name, const Tensor &t) {
            TORCH_CHECK_TYPE(t.scalar_type() == at::kInt, name, " is ", t.scalar_type(), ": must be int32");
            args.page_table = static_cast<const int32_t *>(data_or_nothing(t));
        };
        args.max_pages = 1;
        if (cache_batch_idx) { // a table of one column
            integers("cache_batch_idx", *cache_batch_idx);
            check_shape("cache_batch_idx", *cache_batch_idx, "(B,)", {args.batch});
            args.page_table_stride = cache_batch_idx->stride(0);
        }
        if (page_table) {
            integers("page_table", *page_table);
            TORCH_CHECK_VALUE(page_table->dim() == 2 && page_table->size(0) == args.batch, "page_table has shape ",
                              text(page_table->sizes()), ": must be (B, max_pages), B = ", std::to_string(args.batch));
            TORCH_CHECK_VALUE(page_table->stride(1) == 1 || page_table->size(1) <= 1, "page_table has strides ",
                              text(page_table->strides()), ": the last axis must be contiguous; call .contiguous()");
            args.max_pages = page_table->size(1), args.page_table_stride = page_table->stride(0);
        }
    }

    void read_companions() {
        if (rotary_cos) args.rotary.cos = rotary_of("rotary_cos", *rotary_cos);
        if (rotary_sin) args.rotary.sin = rotary_of("rotary_sin", *rotary_sin);
        if (rotary_cos && rotary_sin) {
            check_shape("rotary_sin", *rotary_sin, "that of rotary_cos", rotary_cos->sizes());
            TORCH_CHECK_TYPE(rotary_sin->scalar_type() == rotary_cos->scalar_type(), "rotary_sin is ",
                             rotary_sin->scalar_type(), " and rotary_cos is ", rotary_cos->scalar_type(),
                             ": they must have one dtype");
        }
        if (alibi_slopes)
            args.alibi_slopes = per_head_of("alibi_slopes", *alibi_slopes, args.batch, args.heads_q, true);
        if (sinks) args.sinks = per_head_of("sinks", *sinks, args.batch, args.heads_q, false);
        if (k_descale) args.k_descale = per_head_of("k_descale", *k_descale, args.batch, args.heads_kv, true, "Hkv");
        if (v_descale) args.v_descale = per_head_of("v_descale", *v_descale, args.batch, args.heads_kv, true, "Hkv");
        if (tree_mask) {
            const Tensor &t = *tree_mask;
            const int64_t rows = args.seqlen_q;
            TORCH_CHECK_TYPE(t.scalar_type() == at::kBool, "tree_mask is ", t.scalar_type(), ": must be bool");
            TORCH_CHECK_VALUE((t.dim() == 2 || (t.dim() == 3 && t.size(0) == args.batch)) && t.size(-1) == rows &&
                                  t.size(-2) == rows,
                              "tree_mask has shape ", text(t.sizes()),
                              ": must be (Lq, Lq) or (B, Lq, Lq) = ", text({args.batch, rows, rows}));
            TORCH_CHECK_VALUE(rows <= 1 || (t.stride(-1) == 1 && t.stride(-2) == rows), "tree_mask has strides ",
                              text(t.strides()), ": its last two axes must be contiguous; call .contiguous()");
            args.tree_mask = static_cast<const uint8_t *>(data_or_nothing(t));
            args.tree_mask_stride_b = t.dim() == 3 ? t.stride(0) : 0;
        }
    }

    const void *rotary_of(const char *name, const Tensor &t) {
        TORCH_CHECK_VALUE(t.dim() == 2 && t.is_contiguous(), name, " has shape ", text(t.sizes()),
                          ": must be a contiguous (positions, rotary_dim / 2)");
        args.rotary.dtype = dtype_of(name, t), args.rotary.positions = t.size(0), args.rotary.dim = 2 * t.size(1);
        return data_or_nothing(t);
    }

    void read_out() {
        if (!out) return;
        TORCH_CHECK_TYPE(out->scalar_type() == q->scalar_type(), "out is ", out->scalar_type(), " and q is ",
                         q->scalar_type(), ": they must have one dtype");
        args.o = tensor_of("out", *out, false);
        check_shape("out", *out, "(B, Hq, Lq, Dv)", {args.batch, args.heads_q, args.seqlen_q, args.head_dim_v});
        check_each_row_is_its_own("out", *out);
    }

    // Of the lengths as they are, which on a CPU may be looked at.
    double multiplications() const {
        double tokens = 0;
        for (int64_t b = 0; b < args.batch; ++b) tokens += static_cast<double>(args.cache_seqlens[b] + args.seqlen_q);
        return tokens * static_cast<double>(args.heads_q * args.seqlen_q) *
               static_cast<double>(args.head_dim + args.head_dim_v);
    }

    Tensor empty_lse() {
        const at::TensorOptions options = q->options().dtype(args.dtype == FA_FLOAT64 ? at::kDouble : at::kFloat);
        if (!return_lse) return at::empty({0}, options);
        Tensor lse = at::empty({args.batch, args.heads_q, args.seqlen_q}, options);
        args.lse = lse_tensor(lse, false);
        return lse;
    }

    size_t bytes() const {
        size_t bytes = 0;
        check(fa_kvcache_workspace_bytes(&args, &bytes));
        return bytes;
    }

    void check_lengths() const {
        if (!lengths_are_checked(args.device)) return;
        fa_kvcache_args on_cpu = args;
        const Tensor lengths = cache_seqlens->cpu(), *table = page_table ? page_table : cache_batch_idx;
        const Tensor pages = table ? table->cpu().contiguous() : Tensor();
        on_cpu.cache_seqlens = lengths.const_data_ptr<int32_t>();
        if (table) on_cpu.page_table = pages.const_data_ptr<int32_t>(), on_cpu.page_table_stride = args.max_pages;
        check(fa_kvcache_check(&on_cpu));
    }
};

} // namespace fa

#endif
