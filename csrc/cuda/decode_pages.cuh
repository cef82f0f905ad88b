// Where the keys of a turn lie in a paged cache. A cache without pages is one with a page for each sequence.
#ifndef FA_DECODE_PAGES_CUH
#define FA_DECODE_PAGES_CUH

#include "cuda/decode_plan.cuh"

__device__ __forceinline__ bool page_exists(const fa_kvcache_args &args, int page) {
    return static_cast<unsigned>(page) < static_cast<unsigned>(args.pages);
}
__device__ __forceinline__ int row_in_page(const DecodePlan &plan, int token) {
    return token - plan.page_size.quotient(token) * static_cast<int>(plan.page_size.value);
}
// As the table says; -1 beyond the sequence's end.
__device__ __forceinline__ int page_of(const fa_kvcache_args &args, const DecodePlan &plan, int b, int token,
                                       int len_k) {
    if (token >= len_k) return -1;
    return args.page_table ? args.page_table[b * args.page_table_stride + plan.page_size.quotient(token)] : b;
}

#endif
