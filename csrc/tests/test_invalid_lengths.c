// Lengths that no host has checked: a GPU kernel may compute anything from them but touches no memory outside its tensors.
#include <stdint.h>
#include <string.h>

#include "problem.h"

enum { kBatch = 5, kSets = 6 };
// As seqlens, beyond 0 ... L; as cu_seqlens, they also start late, decrease and overlap.
static const int32_t kLengths[kSets][kBatch + 1] = {
    {-1, -7, INT32_MIN, -1, 0, -3},
    {1000, 41, INT32_MAX, 51, 77, 1 << 20},
    {40, 12, 30, 3, INT32_MAX, INT32_MIN},
    {0, 90, 10, 200, -5, 60},
    {0, 256, 0, 256, 0, 256}, // sequences that lie on each other; twice, so that those of q and of k do at once
    {0, 256, 0, 256, 0, 256},
};

static void change(int32_t *lengths, const int32_t *values, int count) {
    guarded_protect(lengths, true);
    memcpy(lengths, values, (size_t)count * sizeof *lengths);
    guarded_protect(lengths, false);
}

static void run(const attention_case *c, fa_dtype dtype, fa_impl impl) {
    const int count = kBatch + (c->lengths == LENGTHS_PACKED);
    for (int set = 0; set < kSets; ++set) {
        problem p = problem_make(c, dtype, impl, false, GPU_ALIGNED);
        if (problem_serves(&p, FA_FORWARD)) {
            test_begin("%s, set %d, %s, %s", c->name, set, fa_dtype_name(dtype), fa_impl_name(impl));
            change(p.lengths_q, kLengths[set], count);
            change(p.lengths_k, kLengths[(set + 1) % kSets], count);
            problem_run(&p, (fa_workers){0}, GPU_ALIGNED);
        }
        guarded_release_all();
    }
}

void test_invalid_lengths(void) {
    const attention_case padded = {
        "invalid seqlens",        kBatch, 4, 2, 40, 50, 32, .causal = true, .bias = "bhqk", .sinks = true,
        .lengths = LENGTHS_PADDED};
    const attention_case packed = {"invalid cu_seqlens",
                                   kBatch,
                                   4,
                                   2,
                                   40,
                                   50,
                                   32,
                                   .window = true,
                                   .window_left = 20,
                                   .window_right = 5,
                                   .alibi = 2,
                                   .dropout_p = 0.1,
                                   .lengths = LENGTHS_PACKED};
    const attention_case longer = {
        "invalid cu_seqlens of long sequences", kBatch, 2, 1, 300, 300, 64, .alibi = 1, .lengths = LENGTHS_PACKED};
    for (int32_t i = 0; i < fa_kernel_count(); ++i) {
        fa_kernel_info kernel;
        fa_kernel_describe(i, &kernel);
        for (fa_dtype dtype = FA_FLOAT32; kernel.device == FA_CUDA && dtype <= FA_BFLOAT16; ++dtype) {
            run(&padded, dtype, kernel.impl);
            run(&packed, dtype, kernel.impl);
            run(&longer, dtype, kernel.impl);
        }
    }
}
