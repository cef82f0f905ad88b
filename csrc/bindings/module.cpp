// The Python module flash_attention._C: what the build has, and a short way to the ops that a model calls.
#include <ATen/PythonTorchFunctionTLS.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cctype>

#include "bindings/kvcache_request.h"
#include "bindings/request.h"

namespace fa {
namespace {

// x as an op's argument of a kind of FA_REQUEST_KINDS; nothing where it is no plain one.
std::optional<c10::IValue> plain(char kind, PyObject *x) {
    if (x == Py_None && std::isupper(kind)) return c10::IValue();
    switch (std::tolower(kind)) {
    case 't':
        if (THPVariable_CheckExact(x)) return c10::IValue(THPVariable_Unpack(x));
        return std::nullopt;
    case 'i': {
        int overflow = 0;
        const int64_t value = PyLong_CheckExact(x) ? PyLong_AsLongLongAndOverflow(x, &overflow) : (overflow = 1);
        return overflow ? std::nullopt : std::optional(c10::IValue(value));
    }
    case 'f':
        if (PyFloat_Check(x)) return c10::IValue(PyFloat_AS_DOUBLE(x));
        if (const auto whole = plain('i', x)) return c10::IValue(static_cast<double>(whole->toInt()));
        return std::nullopt;
    case 'b':
        if (PyBool_Check(x)) return c10::IValue(x == Py_True);
        return std::nullopt;
    default: { // 's'
        const char *text = PyUnicode_Check(x) ? PyUnicode_AsUTF8(x) : nullptr;
        if (!text) PyErr_Clear();
        return text ? std::optional(c10::IValue(std::string(text))) : std::nullopt;
    }
    }
}

// torch.ops.flash_attention.<op>(*args) without its parsing, where every argument is a plain one (no subclass of a tensor
// but Parameter, no symbolic number) and no mode watches functions. Else nothing: torch.ops is to be called.
template <size_t size>
std::optional<Stack> plain_arguments(const char (&kinds)[size], PyObject *const *args, Py_ssize_t count) {
    if (count != size - 1 || at::impl::torch_function_mode_enabled()) return std::nullopt;
    Stack stack;
    stack.reserve(size - 1);
    for (size_t i = 0; i < size - 1; ++i) {
        std::optional<c10::IValue> value = plain(kinds[i], args[i]);
        if (!value) return std::nullopt;
        stack.push_back(*std::move(value));
    }
    return stack;
}

PyObject *pair_of(const Tensor &o, const Tensor &lse) {
    const auto first = pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(o));
    const auto second = pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(lse));
    return pybind11::make_tuple(first, second).release().ptr();
}

PyObject *forward(PyObject *, PyObject *const *args, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    static const c10::OperatorHandle op =
        c10::Dispatcher::singleton().findSchemaOrThrow("flash_attention::forward", "");
    std::optional<Stack> stack = plain_arguments(FA_REQUEST_KINDS, args, count);
    if (!stack) Py_RETURN_NOTIMPLEMENTED;
    {
        const pybind11::gil_scoped_release others_may_run;
        op.callBoxed(*stack);
    }
    return pair_of((*stack)[0].toTensor(), (*stack)[1].toTensor());
    END_HANDLE_TH_ERRORS
}

PyObject *with_kvcache(PyObject *, PyObject *const *args, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    static const c10::OperatorHandle op =
        c10::Dispatcher::singleton().findSchemaOrThrow("flash_attention::with_kvcache", "");
    std::optional<Stack> stack = plain_arguments(FA_KVCACHE_KINDS, args, count);
    if (!stack) Py_RETURN_NOTIMPLEMENTED;
    c10::IValue &out = (*stack)[kKvcacheOut];
    if (out.isNone()) {
        const Tensor &q = (*stack)[kKvcacheQ].toTensor(), &v_cache = (*stack)[kKvcacheVCache].toTensor();
        if (q.dim() != 4 || v_cache.dim() != 4) Py_RETURN_NOTIMPLEMENTED;
        out = empty_in_layout_of(q, v_cache.size(3));
    }
    const Tensor o = out.toTensor();
    {
        const pybind11::gil_scoped_release others_may_run;
        op.callBoxed(*stack);
    }
    return pair_of(o, (*stack)[0].toTensor());
    END_HANDLE_TH_ERRORS
}

template <auto function>
PyCFunction as_method() {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef g_methods[] = {
    {"forward", as_method<forward>(), METH_FASTCALL,
     "The forward op on arguments of plain types, in the order of its schema; NotImplemented for any other."},
    {"with_kvcache", as_method<with_kvcache>(), METH_FASTCALL,
     "As forward, of the with_kvcache op; makes out where it is None, and returns it and lse."},
    {},
};

} // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "The C core of flash_attention; its ops are torch.ops.flash_attention.*";
    module.attr("version") = FA_VERSION;
    if (PyModule_AddFunctions(module.ptr(), g_methods) != 0) throw pybind11::error_already_set();
    module.def(
        "cpu_isa",
        [] {
            const char *isa = fa_cpu_isa();
            if (!isa) throw pybind11::value_error(fa_error_text());
            return std::string(isa);
        },
        "The CPU instruction set in use. Raises ValueError where FLASH_ATTENTION_ISA names none that this machine has.");
    module.def(
        "kernels",
        [] {
            std::vector<std::pair<std::string, std::string>> rows;
            for (int32_t index = 0; index < fa_kernel_count(); ++index) {
                fa_kernel_info info;
                check(fa_kernel_describe(index, &info));
                rows.emplace_back(info.name, info.device == FA_CUDA ? "cuda" : "cpu");
            }
            return rows;
        },
        "(impl, device) of every kernel of this build, fastest first.");
}

} // namespace fa
