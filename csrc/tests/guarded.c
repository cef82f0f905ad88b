#define _GNU_SOURCE
#include "guarded.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "bench/gpu.h"
#include "harness.h"

typedef struct block {
    unsigned char *pages, *data; // pages: page_bytes between two guard pages; NULL: scratch on the GPU
    size_t page_bytes, bytes;
    bool is_protected;
    unsigned char *gpu; // gpu_bytes there, the twin of data after `lead` of them; NULL: has no twin
    size_t gpu_bytes, lead;
} block;

enum { kMaxBlocks = 256, kZoneBytes = 4096, kZoneByte = 0xA5, kVectorBytes = 16 };
static block g_blocks[kMaxBlocks];
static int g_block_count;

static void require(bool holds, const char *what) {
    if (holds) return;
    perror(what);
    exit(2);
}

static block *new_block(size_t bytes, size_t alignment, placement where) {
    require(g_block_count < kMaxBlocks, "too many blocks of guarded memory");
    block *b = &g_blocks[g_block_count++];
    *b = (block){.bytes = bytes};
    if (!on_gpu(where)) return b;
    const size_t zone = g_sanitize ? 0 : kZoneBytes;
    if (where == GPU_VECTORS && alignment < kVectorBytes) alignment = kVectorBytes;
    b->lead = zone + (where == GPU_ALIGNED ? 0 : alignment);
    b->gpu_bytes = b->lead + (bytes > 0 ? bytes : 1) + zone; // an address even for no bytes: NULL means absent
    b->gpu = gpu_allocate(b->gpu_bytes);
    require(b->gpu, "GPU memory");
    return b;
}

static size_t page_size(void) { return (size_t)sysconf(_SC_PAGESIZE); }

void *guarded(size_t bytes, size_t alignment, placement where) {
    const size_t page = page_size(), page_bytes = (bytes + alignment + page - 1) / page * page;
    unsigned char *map = mmap(NULL, page_bytes + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    require(map != MAP_FAILED && mprotect(map + page, page_bytes, PROT_READ | PROT_WRITE) == 0, "guarded memory");
    memset(map + page, 0xFF, page_bytes);
    const size_t from_end = (bytes + alignment - 1) / alignment * alignment;
    block *b = new_block(bytes, alignment, where);
    b->pages = map + page, b->page_bytes = page_bytes;
    return b->data = b->pages + (where == FLUSH_END ? page_bytes - from_end : 0);
}

void *guarded_scratch(size_t bytes, size_t alignment, placement where) {
    if (!on_gpu(where)) return guarded(bytes, alignment, where);
    const block *b = new_block(bytes, alignment, where);
    if (!g_sanitize) {
        gpu_fill(b->gpu, kZoneByte, b->gpu_bytes);
        gpu_fill(b->gpu + b->lead, 0xFF, bytes);
    }
    return b->gpu + b->lead;
}

static block *find(const void *data) {
    for (int i = g_block_count - 1; i >= 0; --i)
        if (g_blocks[i].pages && g_blocks[i].data == data) return &g_blocks[i];
    return NULL;
}

void *guarded_for_kernel(const void *data) {
    const block *b = find(data);
    return b && b->gpu ? b->gpu + b->lead : (void *)data;
}

void guarded_protect(const void *data, bool writable) {
    block *b = find(data);
    b->is_protected = !writable;
    mprotect(b->pages, b->page_bytes, writable ? PROT_READ | PROT_WRITE : PROT_READ);
}

void guarded_to_gpu(void) {
    for (block *b = g_blocks; b < g_blocks + g_block_count; ++b)
        if (b->gpu && b->pages) {
            gpu_fill(b->gpu, kZoneByte, b->gpu_bytes);
            gpu_copy(b->gpu + b->lead, b->data, b->bytes);
        }
}

static void from_gpu(const block *b) {
    unsigned char *copy = malloc(b->gpu_bytes), *twin = copy + b->lead;
    size_t overwritten = 0;
    gpu_copy(copy, b->gpu, b->gpu_bytes);
    for (const unsigned char *p = copy; p < copy + b->gpu_bytes; ++p)
        overwritten += (p < twin || p >= twin + b->bytes) && *p != kZoneByte;
    expect(overwritten == 0, "%zu bytes written around a block of %zu bytes on the GPU", overwritten, b->bytes);
    if (b->is_protected)
        expect(memcmp(b->data, twin, b->bytes) == 0, "an input of %zu bytes was written", b->bytes);
    else if (b->pages)
        memcpy(b->data, twin, b->bytes);
    free(copy);
}

void guarded_from_gpu(void) {
    for (const block *b = g_blocks; b < g_blocks + g_block_count; ++b)
        if (b->gpu && (b->pages || !g_sanitize)) from_gpu(b); // reading scratch back would count as reading it first
}

void guarded_leave_gpu(void) {
    for (block *b = g_blocks; b < g_blocks + g_block_count; ++b) {
        if (b->gpu) gpu_release(b->gpu);
        b->gpu = NULL;
    }
}

void guarded_release_all(void) {
    guarded_leave_gpu();
    while (g_block_count > 0) {
        const block *b = &g_blocks[--g_block_count];
        if (!b->pages) continue;
        size_t overwritten = 0;
        for (const unsigned char *p = b->pages; p < b->pages + b->page_bytes; ++p)
            overwritten += (p < b->data || p >= b->data + b->bytes) && *p != 0xFF;
        expect(overwritten == 0, "%zu bytes written around a block of %zu bytes", overwritten, b->bytes);
        munmap(b->pages - page_size(), b->page_bytes + 2 * page_size());
    }
}
