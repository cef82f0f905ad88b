// A test is whatever happens between test_begin() and the next one; it passes if no expect() in it fails.
#ifndef FA_TEST_HARNESS_H
#define FA_TEST_HARNESS_H

#include <stdbool.h>

#include "flash_attention.h"

#if defined(__GNUC__)
#define FA_PRINTF(FORMAT, VALUES) __attribute__((format(printf, FORMAT, VALUES)))
#else
#define FA_PRINTF(FORMAT, VALUES)
#endif

void test_begin(const char *format, ...) FA_PRINTF(1, 2);
// Returns `holds`; prints the sentence if it does not.
bool expect(bool holds, const char *format, ...) FA_PRINTF(2, 3);

extern bool g_quick;    // leave out what is slow under valgrind
extern bool g_sanitize; // on the GPU: each case once, in memory that hides nothing from compute-sanitizer

void test_attention(fa_device device);
void test_finite_differences(void);
void test_gate(void);
void test_invalid_lengths(void);
void test_kvcache(fa_device device);
void test_kvcache_gate(void);
void test_tables(void);

#endif
