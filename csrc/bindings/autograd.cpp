// What the dispatcher does around the ops: autocast, then autograd. In C++, because a call from a model pays for it.
#include <ATen/autocast_mode.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>

#include "bindings/kvcache_request.h"
#include "bindings/request.h"

namespace fa {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What a Function is applied to besides tensors; its forward leaves the op's results on the stack.
struct Redispatch {
    const c10::OperatorHandle &op;
    c10::DispatchKeySet keys;
    Stack *stack;

    void operator()() const {
        const at::AutoDispatchBelowADInplaceOrView below;
        op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
    }
};

// The defined ones of `count` tensors from stack position `first` on.
variable_list tensors_of(const Stack &stack, size_t first, size_t count) {
    variable_list tensors;
    tensors.reserve(count);
    for (size_t i = first; i < first + count; ++i)
        if (stack[i].isTensor()) tensors.push_back(stack[i].toTensor());
    return tensors;
}

// Refuses what would be silently zero: a tangent is not for autograd's graph, and nobody else would see it.
bool need_a_graph(const variable_list &tensors) {
    for (const Tensor &t : tensors)
        TORCH_CHECK_NOT_IMPLEMENTED(!t._fw_grad(/*level=*/0).defined(),
                                    "flash_attention has no forward-mode derivative");
    return at::GradMode::is_enabled() &&
           std::any_of(tensors.begin(), tensors.end(), [](const Tensor &t) { return t.requires_grad(); });
}

// The last `count` values of the stack, which must be tensors, taken from it.
variable_list pop_tensors(Stack &stack, size_t count) {
    variable_list tensors = tensors_of(stack, stack.size() - count, count);
    torch::jit::drop(stack, count);
    return tensors;
}

void push_tensors(Stack &stack, variable_list tensors) {
    for (Tensor &t : tensors) stack.emplace_back(std::move(t));
}

struct Attention : torch::autograd::Function<Attention> {
    static variable_list forward(AutogradContext *context, at::TensorList, const Redispatch &redispatch) {
        Stack &stack = *redispatch.stack;
        const auto request = stack.end() - kRequestSize;
        std::vector<c10::IValue> values(request + kTensors, stack.end());
        variable_list saved(2 + kTensors); // o, lse; what is absent stays undefined
        for (size_t i = 0; i < kTensors; ++i)
            if (request[i].isTensor()) saved[2 + i] = request[i].toTensor();
        redispatch();
        variable_list results = pop_tensors(stack, 2);
        saved[0] = results[0], saved[1] = results[1];
        context->save_for_backward(std::move(saved));
        context->saved_data["values"] = c10::ivalue::Tuple::create(std::move(values));
        context->set_materialize_grads(false);
        return results;
    }

    // A gradient for each tensor of forward's list, then none for its Redispatch.
    static variable_list backward(AutogradContext *context, const variable_list &gradients) {
        static const c10::OperatorHandle op =
            c10::Dispatcher::singleton().findSchemaOrThrow("flash_attention::backward", "");
        const variable_list saved = context->get_saved_variables();
        const Tensor &d_o = gradients[0], &d_lse = gradients[1], *const inputs = &saved[2];
        const auto or_none = [](const Tensor &t) { return t.defined() ? c10::IValue(t) : c10::IValue(); };

        Stack stack{d_o.defined() ? d_o : at::zeros_like(saved[0]), or_none(d_lse), saved[0], saved[1]};
        for (size_t i = 0; i < kTensors; ++i) stack.push_back(or_none(inputs[i]));
        for (const c10::IValue &value : context->saved_data["values"].toTupleRef().elements()) stack.push_back(value);
        bool wanted[kDifferentiable];
        size_t edges = 0;
        for (size_t i = 0; i < kDifferentiable; ++i)
            wanted[i] = inputs[i].defined() && context->needs_input_grad(edges++);
        stack.emplace_back(c10::List<bool>{wanted[3], wanted[4], wanted[5]});
        op.callBoxed(stack);

        variable_list results;
        for (size_t i = 0; i < kDifferentiable; ++i)
            if (inputs[i].defined()) results.push_back(wanted[i] ? stack[i].toTensor() : Tensor());
        results.emplace_back();
        return results;
    }
};

struct Gradients : torch::autograd::Function<Gradients> {
    static variable_list forward(AutogradContext *, at::TensorList, const Redispatch &redispatch) {
        redispatch();
        return pop_tensors(*redispatch.stack, kDifferentiable);
    }

    static variable_list backward(AutogradContext *, const variable_list &) {
        TORCH_CHECK_NOT_IMPLEMENTED(false,
                                    "flash_attention has no second derivative: its backward is not differentiable");
    }
};

// The op's first `tensors` arguments are those that it may be differentiated by.
template <class Function, size_t tensors>
void autograd_op(const c10::OperatorHandle &op, c10::DispatchKeySet keys, Stack *stack) {
    const Redispatch redispatch{op, keys, stack};
    const variable_list inputs = tensors_of(*stack, stack->size() - op.schema().arguments().size(), tensors);
    if (need_a_graph(inputs))
        push_tensors(*stack, Function::apply(at::TensorList(inputs), redispatch));
    else
        redispatch();
}

// Refuses a graph; else tells autograd what is written.
void kvcache_op(const c10::OperatorHandle &op, c10::DispatchKeySet keys, Stack *stack) {
    const size_t first = stack->size() - kKvcacheSize;
    TORCH_CHECK_NOT_IMPLEMENTED(!need_a_graph(tensors_of(*stack, first, kKvcacheTensors)),
                                "flash_attention_with_kvcache has no backward: call it under torch.no_grad()");
    variable_list written = tensors_of(*stack, first + kKvcacheOut, 1);
    if (!(*stack)[first + kKvcacheK].isNone())
        for (Tensor &t : tensors_of(*stack, first + kKvcacheKCache, 2)) written.push_back(std::move(t));
    Redispatch{op, keys, stack}();
    for (const Tensor &t : written)
        if (!t.is_inference()) torch::autograd::impl::bump_version(t);
}

// As matmul does: q, k, v in autocast's dtype, float64 as it is; and bias or sinks where they have 16 bits.
template <c10::DeviceType device, c10::DispatchKey key>
void autocast_op(const c10::OperatorHandle &op, Stack *stack) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
    const auto request = stack->end() - static_cast<int64_t>(op.schema().arguments().size());
    for (const int i : {0, 1, 2, 3, 5}) {
        if (!request[i].isTensor()) continue;
        const Tensor t = request[i].toTensor();
        const bool has_16_bits = t.scalar_type() == at::kHalf || t.scalar_type() == at::kBFloat16;
        if (i < 3 ? has_16_bits || t.scalar_type() == at::kFloat : has_16_bits)
            request[i] = at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), t, device);
    }
    op.callBoxed(stack);
}

template <c10::DeviceType device, c10::DispatchKey key>
void register_autocast(torch::Library &library) {
    for (const char *op : {"forward", "workspace_bytes", "explain"})
        library.impl(op, torch::CppFunction::makeFromBoxedFunction<autocast_op<device, key>>());
}

TORCH_LIBRARY_IMPL(flash_attention, Autograd, library) {
    library.impl("forward", torch::CppFunction::makeFromBoxedFunction<autograd_op<Attention, kDifferentiable>>());
    library.impl("backward", torch::CppFunction::makeFromBoxedFunction<autograd_op<Gradients, 4 + kDifferentiable>>());
    library.impl("with_kvcache", torch::CppFunction::makeFromBoxedFunction<kvcache_op>());
}
TORCH_LIBRARY_IMPL(flash_attention, AutocastCPU, library) {
    register_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>(library);
}
TORCH_LIBRARY_IMPL(flash_attention, AutocastCUDA, library) {
    register_autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>(library);
}

} // namespace
} // namespace fa
