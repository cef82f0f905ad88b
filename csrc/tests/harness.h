// A test is whatever happens between test_begin() and the next one; it passes if no expect() in it fails.
#ifndef FA_TEST_HARNESS_H
#define FA_TEST_HARNESS_H

#include <stdbool.h>
#include <stddef.h>

#if defined(__GNUC__)
#define FA_PRINTF(FORMAT, VALUES) __attribute__((format(printf, FORMAT, VALUES)))
#else
#define FA_PRINTF(FORMAT, VALUES)
#endif

void test_begin(const char *format, ...) FA_PRINTF(1, 2);
// Returns `holds`; prints the sentence if it does not.
bool expect(bool holds, const char *format, ...) FA_PRINTF(2, 3);

extern bool g_quick; // leave out what is slow under valgrind

// Memory that ends (FLUSH_END) or begins (FLUSH_START) at an inaccessible page, with one at its other end too; every byte
// 0xFF, which is NaN in every dtype. alignment: a power of two.
typedef enum placement { FLUSH_START, FLUSH_END } placement;
void *guarded(size_t bytes, size_t alignment, placement where);
void guarded_protect(const void *data, bool writable);
void guarded_release_all(void); // and expects the bytes around each block to be 0xFF still

void test_attention(void);
void test_finite_differences(void);
void test_gate(void);
void test_tables(void);

#endif
