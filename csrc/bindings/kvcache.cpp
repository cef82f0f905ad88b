// The ops over a key/value cache.
#include "bindings/kvcache_request.h"

namespace fa {
namespace {

void with_kvcache_op(const c10::OperatorHandle &, Stack *stack) {
    KvcacheRequest request(*stack, stack->size() - kKvcacheSize);
    const size_t bytes = request.bytes(); // refuses a bad request before anything is allocated
    request.check_lengths();
    Tensor lse = request.empty_lse(), memory;
    if (bytes) memory = empty_bytes(bytes, *request.q), request.args.workspace = memory.data_ptr();
    request.args.workspace_bytes = bytes;
    check(fa_kvcache_forward(&request.args));
    torch::jit::drop(*stack, kKvcacheSize);
    torch::jit::push(*stack, std::move(lse));
}

void workspace_bytes_op(const c10::OperatorHandle &, Stack *stack) {
    const size_t bytes = KvcacheRequest(*stack, stack->size() - kKvcacheSize).bytes();
    torch::jit::drop(*stack, kKvcacheSize);
    torch::jit::push(*stack, static_cast<int64_t>(bytes));
}

void explain_op(const c10::OperatorHandle &, Stack *stack) {
    const KvcacheRequest request(*stack, stack->size() - kKvcacheSize);
    auto rows = verdicts([&](int32_t index, char *verdict, size_t size) {
        return fa_kvcache_verdict(index, &request.args, verdict, size);
    });
    torch::jit::drop(*stack, kKvcacheSize);
    torch::jit::push(*stack, std::move(rows));
}

// The caches are written only where k is given; a schema cannot say so.
TORCH_LIBRARY_FRAGMENT(flash_attention, library) {
    library.def("with_kvcache(" FA_KVCACHE_REQUEST("Tensor(a!)", "Tensor(b!)", "Tensor(c!)") ") -> Tensor lse");
    library.def("with_kvcache_workspace_bytes(" FA_KVCACHE_REQUEST("Tensor", "Tensor", "Tensor?") ") -> int");
    library.def("with_kvcache_explain(" FA_KVCACHE_REQUEST("Tensor", "Tensor", "Tensor?") ") -> str[]");
}

void register_kernels(torch::Library &library) {
    library.impl("with_kvcache", torch::CppFunction::makeFromBoxedFunction<with_kvcache_op>());
    library.impl("with_kvcache_workspace_bytes", torch::CppFunction::makeFromBoxedFunction<workspace_bytes_op>());
    library.impl("with_kvcache_explain", torch::CppFunction::makeFromBoxedFunction<explain_op>());
}
TORCH_LIBRARY_IMPL(flash_attention, CPU, library) { register_kernels(library); }
TORCH_LIBRARY_IMPL(flash_attention, CUDA, library) { register_kernels(library); }

} // namespace
} // namespace fa
