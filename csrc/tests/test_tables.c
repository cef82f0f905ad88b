// Dropout bits, 16-bit conversions, sequences and their masks, names, the kernel table and its verdicts.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/convert.h"
#include "flash_attention.h"
#include "harness.h"
#include "philox.h"
#include "sequence.h"

static void test_philox(void) {
    // Random123, kat_vectors: philox4x32-7
    static const uint32_t kAnswers[2][4] = {{0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48},
                                            {0x5207ddc2, 0x45165e59, 0x4d8ee751, 0x8c52f662}};
    test_begin("philox: known answers");
    for (uint32_t i = 0; i < 2; ++i) {
        const uint32_t ones = i * UINT32_MAX;
        uint32_t words[4] = {ones, ones, ones, ones};
        fa_philox(words, ones, ones);
        expect(memcmp(words, kAnswers[i], sizeof words) == 0, "%08x %08x %08x %08x", words[0], words[1], words[2],
               words[3]);
    }

    test_begin("dropout: the share that is dropped");
    const int rows = 1000, cols = 1000;
    const double dropout_p = 0.25;
    int dropped = 0;
    for (int i = 0; i < rows; ++i)
        for (int j = 0; j < cols; ++j) dropped += !fa_dropout_keeps(99, 0, 3, i, j, fa_dropout_threshold(dropout_p));
    const double sigma = sqrt(rows * cols * dropout_p * (1 - dropout_p));
    expect(fabs(dropped - rows * cols * dropout_p) < 5 * sigma, "%d of %d", dropped, rows * cols);

    test_begin("dropout: no two entries of a 16 x 16 tile share their bits");
    char drawn[256] = {0};
    for (int64_t i = 0; i < 16; ++i)
        for (int64_t j = 0; j < 16; ++j) {
            const uint32_t group = fa_dropout_row_word(i) * 4 + fa_dropout_col_word(j);
            const uint32_t field = (uint32_t)(4 * ((j >> 3) & 1) + 2 * ((i >> 3) & 1) + (j & 1));
            expect(group < 32 && !drawn[group * 8 + field]++, "entry (%d, %d)", (int)i, (int)j);
        }
}

static void test_conversions(void) {
    test_begin("float16, bfloat16: every value survives the round trip");
    for (uint32_t bits = 0; bits < 65536; ++bits) {
        const bool f16_nan = (bits & 0x7FFF) > 0x7C00, bf16_nan = (bits & 0x7FFF) > 0x7F80;
        const float f16 = fa_f16_to_f32((uint16_t)bits), bf16 = fa_bf16_to_f32((uint16_t)bits);
        expect(f16_nan ? isnan(f16) && isnan(fa_f16_to_f32(fa_f32_to_f16(f16))) : fa_f32_to_f16(f16) == bits,
               "float16 %x", bits);
        expect(bf16_nan ? isnan(bf16) && isnan(fa_bf16_to_f32(fa_f32_to_bf16(bf16))) : fa_f32_to_bf16(bf16) == bits,
               "bfloat16 %x", bits);
    }
    test_begin("float16, bfloat16: halfway values round to even, others to the nearest");
    for (uint16_t bits = 0; bits < 0x7BFF; ++bits) {
        const float low = fa_f16_to_f32(bits), high = fa_f16_to_f32((uint16_t)(bits + 1)), middle = (low + high) / 2;
        expect(fa_f32_to_f16(middle) == (bits & 1 ? bits + 1 : bits), "float16 %x", bits);
        expect(fa_f32_to_f16(nextafterf(middle, 0)) == bits && fa_f32_to_f16(nextafterf(middle, INFINITY)) == bits + 1,
               "float16 near %x", bits);
    }
    for (uint16_t bits = 0; bits < 0x7F7F; ++bits) {
        const uint32_t middle = (uint32_t)bits << 16 | 0x8000;
        expect(fa_f32_to_bf16(fa_f32_from_bits(middle)) == (bits & 1 ? bits + 1 : bits), "bfloat16 %x", bits);
        expect(fa_f32_to_bf16(fa_f32_from_bits(middle - 1)) == bits &&
                   fa_f32_to_bf16(fa_f32_from_bits(middle + 1)) == bits + 1,
               "bfloat16 near %x", bits);
    }
    test_begin("float16, bfloat16: what is too large becomes infinite");
    expect(fa_f32_to_f16(65519.0F) == 0x7BFF && fa_f32_to_f16(65520.0F) == 0x7C00 && fa_f32_to_f16(-1e30F) == 0xFC00,
           "float16");
    expect(fa_f32_to_bf16(3.4e38F) == 0x7F80 && fa_f32_to_bf16(-INFINITY) == 0xFF80, "bfloat16");
}

// The reference asks the same function as the kernels: here it meets the definition in flash_attention.h.
static void test_visible_keys(void) {
    test_begin("visible keys: the interval is the definition");
    const int64_t lengths[] = {0, 1, 4, 7, 11}, windows[] = {-1, 0, 1, 5, 20, INT64_MAX};
    for (int lengths_at = 0; lengths_at < 25; ++lengths_at)
        for (int rule = 0; rule < 72; ++rule) {
            const int64_t left = windows[rule % 6], right = windows[rule / 6 % 6];
            const fa_sequence seq = {.len_q = lengths[lengths_at % 5], .len_k = lengths[lengths_at / 5]};
            const fa_forward_args args = {.causal = rule >= 36, .window_left = left, .window_right = right};
            for (int64_t i = 0; i < seq.len_q; ++i) {
                const fa_interval keys = fa_visible_keys(&args, &seq, i);
                const int64_t center = i + seq.len_k - seq.len_q;
                expect(keys.lo >= 0 && keys.hi <= seq.len_k, "[%d, %d)", (int)keys.lo, (int)keys.hi);
                for (int64_t j = 0; j < seq.len_k; ++j) {
                    const bool visible = (!args.causal || j <= center) && (left < 0 || center - j <= left) &&
                                         (right < 0 || j - center <= right);
                    expect(visible == (j >= keys.lo && j < keys.hi), "row %d, key %d: [%d, %d)", (int)i, (int)j,
                           (int)keys.lo, (int)keys.hi);
                }
            }
        }
}

static void expect_seeing_rows(const fa_forward_args *args, const fa_sequence *seq, int64_t key0, int64_t key1) {
    const fa_interval rows = fa_seeing_rows(args, seq, key0, key1);
    expect(rows.lo >= 0 && rows.hi >= 0 && rows.hi <= seq->len_q, "[%lld, %lld)", (long long)rows.lo,
           (long long)rows.hi);
    for (int64_t i = 0; i < seq->len_q; ++i) {
        const fa_interval keys = fa_visible_keys(args, seq, i);
        const bool sees = fa_max(keys.lo, key0) < fa_min(keys.hi, key1);
        expect(sees == (i >= rows.lo && i < rows.hi), "row %d, keys [%d, %d): [%lld, %lld)", (int)i, (int)key0,
               (int)key1, (long long)rows.lo, (long long)rows.hi);
    }
}

static void test_seeing_rows(void) {
    test_begin("seeing rows: the interval is of those whose visible keys meet the block");
    const int64_t lengths[] = {0, 1, 4, 7, 11}, windows[] = {-1, 0, 1, 5, 20, INT64_MAX - 1, INT64_MAX};
    for (int lengths_at = 0; lengths_at < 25; ++lengths_at)
        for (int rule = 0; rule < 98; ++rule) {
            const fa_sequence seq = {.len_q = lengths[lengths_at % 5], .len_k = lengths[lengths_at / 5]};
            const fa_forward_args args = {
                .causal = rule >= 49, .window_left = windows[rule % 7], .window_right = windows[rule / 7 % 7]};
            for (int64_t key0 = 0; key0 < seq.len_k; ++key0)
                for (int64_t key1 = key0 + 1; key1 <= seq.len_k; ++key1) expect_seeing_rows(&args, &seq, key0, key1);
        }
}

static void test_sequences(void) {
    enum { kBatch = 6, kRows = 40, kTotal = 100 };
    static const int32_t kGarbage[][kBatch + 1] = {
        {0, 30, 30, 70, 100, 100, 100},
        {-1, INT32_MIN, -7, 0, -40, -2, -3},
        {1000, INT32_MAX, 41, 101, 77, 1 << 20, INT32_MAX},
        {100, 80, 60, 40, 20, 0, -20},
        {INT32_MAX, INT32_MIN, INT32_MAX, INT32_MIN, 0, INT32_MAX, 5},
        {0, 100, 0, 100, 50, INT32_MAX, 99},
    };
    enum { kSets = sizeof kGarbage / sizeof kGarbage[0] };
    test_begin("sequences: whatever the lengths, their rows are in the tensors");
    for (int set = 0; set < kSets; ++set) {
        const int32_t *of_q = kGarbage[set], *of_k = kGarbage[(set + 1) % kSets];
        const fa_forward_args padded = {
            .batch = kBatch, .seqlen_q = kRows, .seqlen_k = kRows + 1, .seqlens_q = of_q, .seqlens_k = of_k};
        const fa_forward_args packed = {.batch = kBatch,
                                        .seqlen_q = kRows,
                                        .seqlen_k = kRows + 1,
                                        .cu_seqlens_q = of_q,
                                        .cu_seqlens_k = of_k,
                                        .total_q = kTotal,
                                        .total_k = kTotal - 1};
        for (int64_t b = 0; b < kBatch; ++b) {
            fa_sequence seq = fa_sequence_at(&padded, b);
            expect(seq.batch_index == b && seq.row_q == 0 && seq.row_k == 0, "set %d, padded %d: lies elsewhere", set,
                   (int)b);
            expect(seq.len_q == fa_clamp(of_q[b], 0, kRows) && seq.len_k == fa_clamp(of_k[b], 0, kRows + 1),
                   "set %d, padded %d: %lld queries, %lld keys", set, (int)b, (long long)seq.len_q,
                   (long long)seq.len_k);
            seq = fa_sequence_at(&packed, b);
            expect(seq.batch_index == 0 && seq.row_q >= 0 && seq.row_k >= 0, "set %d, packed %d: starts before", set,
                   (int)b);
            expect(seq.len_q >= 0 && seq.len_q <= kRows && seq.row_q + seq.len_q <= kTotal,
                   "set %d, packed %d: %lld + %lld", set, (int)b, (long long)seq.row_q, (long long)seq.len_q);
            expect(seq.len_k >= 0 && seq.len_k <= kRows + 1 && seq.row_k + seq.len_k <= kTotal - 1,
                   "set %d, packed %d: %lld + %lld", set, (int)b, (long long)seq.row_k, (long long)seq.len_k);
        }
    }

    test_begin("sequences: lengths that are right stay as they are");
    const fa_forward_args right = {.batch = kBatch,
                                   .seqlen_q = kRows,
                                   .seqlen_k = kRows,
                                   .cu_seqlens_q = kGarbage[0],
                                   .cu_seqlens_k = kGarbage[0],
                                   .total_q = kTotal,
                                   .total_k = kTotal};
    for (int64_t b = 0; b < kBatch; ++b) {
        const fa_sequence seq = fa_sequence_at(&right, b);
        const int64_t row = kGarbage[0][b], length = kGarbage[0][b + 1] - row;
        expect(seq.row_q == row && seq.row_k == row && seq.len_q == length && seq.len_k == length, "sequence %d",
               (int)b);
    }
}

static void test_names(void) {
    test_begin("names: every impl parses back");
    for (fa_impl impl = FA_AUTO; impl <= FA_HOPPER; ++impl) {
        fa_impl parsed = (fa_impl)99;
        expect(fa_impl_parse(fa_impl_name(impl), &parsed) == FA_OK && parsed == impl, "%s", fa_impl_name(impl));
    }
    fa_impl impl;
    expect(fa_impl_parse("fastest", &impl) == FA_ERROR_VALUE && strstr(fa_error_text(), "impl 'fastest'"), "%s",
           fa_error_text());
    expect(strcmp(fa_dtype_name(FA_BFLOAT16), "bfloat16") == 0, "%s", fa_dtype_name(FA_BFLOAT16));
    expect(fa_impl_name((fa_impl)1000) != NULL && fa_dtype_name((fa_dtype)-1) != NULL, "out of range");
}

static void test_kernels(void) {
    test_begin("kernel table: one is chosen, the others say why not");
    fa_forward_args args = {.batch = 1, .heads_q = 1, .heads_kv = 1, .seqlen_q = 8, .seqlen_k = 8, .softmax_scale = 1};
    args.head_dim = args.head_dim_v = 8, args.window_left = args.window_right = -1;
    int on_cpu = 0, chosen = 0;
    char text[256];
    for (int32_t i = 0; i < fa_kernel_count(); ++i) {
        fa_kernel_info info;
        expect(fa_kernel_describe(i, &info) == FA_OK && strcmp(info.name, fa_impl_name(info.impl)) == 0, "row %d",
               (int)i);
        for (fa_pass pass = FA_FORWARD; pass <= FA_BACKWARD; ++pass) {
            expect(fa_kernel_verdict(i, &args, pass, text, sizeof text) == FA_OK && text[0], "row %d: %s", (int)i,
                   fa_error_text());
            chosen += strcmp(text, "chosen") == 0;
            expect(info.device == FA_CPU || strstr(text, "runs on cuda"), "%s: %s", info.name, text);
        }
        on_cpu += info.device == FA_CPU;
    }
    expect(on_cpu == 3 && chosen == 2, "%d kernels on the CPU, %d chosen", on_cpu, chosen);

    test_begin("kernel table: a text that is too long is cut");
    memset(text, 'x', sizeof text);
    expect(fa_kernel_verdict(0, &args, FA_FORWARD, text, 4) == FA_OK && strlen(text) == 3 && text[4] == 'x', "%.8s",
           text);

    test_begin("kernel table: no such row, no such request");
    fa_kernel_info info;
    expect(fa_kernel_describe(-1, &info) == FA_ERROR_VALUE, "row -1");
    expect(fa_kernel_describe(fa_kernel_count(), &info) == FA_ERROR_VALUE, "one row too many");
    expect(fa_kernel_verdict(1000, &args, FA_FORWARD, text, sizeof text) == FA_ERROR_VALUE, "row 1000");
    args.head_dim = 0;
    expect(fa_kernel_verdict(0, &args, FA_FORWARD, text, sizeof text) == FA_ERROR_VALUE, "head_dim 0");
}

static void count_calls(void *arg, int32_t worker) { ++((int *)arg)[worker]; }

static void test_workers(void) {
    test_begin("POSIX workers: each runs once");
    for (int32_t count = -1; count <= 9; count += 2) {
        const fa_workers workers = fa_posix_workers(count);
        int calls[16] = {0};
        workers.run(workers.context, count_calls, calls);
        expect(workers.count == (count < 1 ? 1 : count), "asked for %d, got %d", (int)count, (int)workers.count);
        for (int w = 0; w < 16; ++w)
            expect(calls[w] == (w < workers.count), "worker %d of %d: %d calls", w, (int)count, calls[w]);
    }
}

void test_tables(void) {
    test_philox();
    test_conversions();
    test_visible_keys();
    test_seeing_rows();
    test_sequences();
    test_names();
    test_kernels();
    test_workers();
}
