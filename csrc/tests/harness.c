// Runs every test once for each instruction set of this machine, each in a process of its own: the choice is made once a
// process, and a crash is then a failure with a name.
#define _GNU_SOURCE
#include "harness.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "flash_attention.h"

bool g_quick;

static struct tally { // shared with the child processes
    int passed, failed;
    bool is_open, has_failed, has_isa;
    char test[256];
} *tally;

static void test_end(void) {
    if (tally->is_open) ++*(tally->has_failed ? &tally->failed : &tally->passed);
    tally->is_open = false;
}

void test_begin(const char *format, ...) {
    va_list values;
    test_end();
    tally->is_open = true;
    tally->has_failed = false;
    va_start(values, format);
    vsnprintf(tally->test, sizeof tally->test, format, values);
    va_end(values);
}

bool expect(bool holds, const char *format, ...) {
    if (holds) return true;
    va_list values;
    tally->has_failed = true;
    const char *isa = getenv("FLASH_ATTENTION_ISA");
    printf("FAILED [%s] %s: ", isa ? isa : "", tally->test);
    va_start(values, format);
    vprintf(format, values);
    va_end(values);
    printf("\n");
    return false;
}

// ---- guarded memory -------------------------------------------------------------------------------------------------

typedef struct block {
    unsigned char *pages, *data; // pages: page_bytes between two guard pages
    size_t page_bytes, bytes;
} block;

enum { kMaxBlocks = 128 };
static block g_blocks[kMaxBlocks];
static int g_block_count;

void *guarded(size_t bytes, size_t alignment, placement where) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), page_bytes = (bytes + alignment + page - 1) / page * page;
    unsigned char *map = mmap(NULL, page_bytes + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED || g_block_count == kMaxBlocks || mprotect(map + page, page_bytes, PROT_READ | PROT_WRITE)) {
        perror("guarded memory");
        exit(2);
    }
    memset(map + page, 0xFF, page_bytes);
    const size_t from_end = (bytes + alignment - 1) / alignment * alignment;
    block *b = &g_blocks[g_block_count++];
    *b = (block){map + page, map + page + (where == FLUSH_END ? page_bytes - from_end : 0), page_bytes, bytes};
    return b->data;
}

void guarded_protect(const void *data, bool writable) {
    for (int i = 0; i < g_block_count; ++i)
        if (g_blocks[i].data == data)
            mprotect(g_blocks[i].pages, g_blocks[i].page_bytes, writable ? PROT_READ | PROT_WRITE : PROT_READ);
}

void guarded_release_all(void) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    while (g_block_count > 0) {
        const block *b = &g_blocks[--g_block_count];
        size_t overwritten = 0;
        for (const unsigned char *p = b->pages; p < b->pages + b->page_bytes; ++p)
            overwritten += (p < b->data || p >= b->data + b->bytes) && *p != 0xFF;
        expect(overwritten == 0, "%zu bytes written around a block of %zu bytes", overwritten, b->bytes);
        munmap(b->pages - page, b->page_bytes + 2 * page);
    }
}

// ---- processes ------------------------------------------------------------------------------------------------------

static void run_tests(const char *isa) {
    if (isa) setenv("FLASH_ATTENTION_ISA", isa, 1);
    tally->has_isa = fa_cpu_isa() != NULL;
    if (!tally->has_isa) return;
    test_begin("the instruction set in use is the one asked for");
    expect(!isa || strcmp(isa, fa_cpu_isa()) == 0, "%s", fa_cpu_isa());
    test_tables();
    test_gate();
    test_finite_differences();
    test_attention();
    test_end();
}

static void run_process(const char *isa) {
    fflush(stdout);
    const int passed = tally->passed, failed = tally->failed;
    const pid_t child = fork();
    if (child == 0) {
        run_tests(isa);
        exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    if (WIFSIGNALED(status) || WEXITSTATUS(status) != 0) {
        printf("FAILED [%s] %s: %s\n", isa, tally->test,
               WIFSIGNALED(status) ? strsignal(WTERMSIG(status)) : "stopped (see above)");
        ++tally->failed;
        tally->is_open = false;
    }
    if (tally->has_isa) printf("%-12s %5d passed, %d failed\n", isa, tally->passed - passed, tally->failed - failed);
}

// c_tests [--quick]: FLASH_ATTENTION_ISA, if set, is the only instruction set.
int main(int argc, char **argv) {
    static const char *const kIsas[] = {"scalar", "avx2", "avx512", "avx512_bf16"};
    setvbuf(stdout, NULL, _IOLBF, 0); // what was printed before a crash is seen
    g_quick = argc > 1 && strcmp(argv[1], "--quick") == 0;
    tally = mmap(NULL, sizeof *tally, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    const char *only = getenv("FLASH_ATTENTION_ISA");
    for (size_t i = 0; i < sizeof kIsas / sizeof kIsas[0]; ++i)
        if (!only || strcmp(only, kIsas[i]) == 0) run_process(kIsas[i]);
    printf("%d passed, %d failed\n", tally->passed, tally->failed);
    return tally->failed > 0 || tally->passed == 0;
}
