// The Python module flash_attention._C: what the build has, and a short way to the forward op.
#include <ATen/PythonTorchFunctionTLS.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cctype>

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

// torch.ops.flash_attention.forward(*args) without its parsing, where every argument is a plain one (no subclass of a
// tensor but Parameter, no symbolic number) and no mode watches functions. Else NotImplemented: torch.ops is to be called.
PyObject *forward(PyObject *, PyObject *const *args, Py_ssize_t count) {
    HANDLE_TH_ERRORS
    static const c10::OperatorHandle op =
        c10::Dispatcher::singleton().findSchemaOrThrow("flash_attention::forward", "");
    if (count != kRequestSize || at::impl::torch_function_mode_enabled()) Py_RETURN_NOTIMPLEMENTED;
    Stack stack;
    stack.reserve(kRequestSize);
    for (int i = 0; i < kRequestSize; ++i) {
        std::optional<c10::IValue> value = plain(FA_REQUEST_KINDS[i], args[i]);
        if (!value) Py_RETURN_NOTIMPLEMENTED;
        stack.push_back(*std::move(value));
    }
    {
        const pybind11::gil_scoped_release others_may_run;
        op.callBoxed(stack);
    }
    const auto o = pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(stack[0].toTensor()));
    const auto lse = pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(stack[1].toTensor()));
    return pybind11::make_tuple(o, lse).release().ptr();
    END_HANDLE_TH_ERRORS
}

PyMethodDef g_methods[] = {
    {"forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(forward)), METH_FASTCALL,
     "The forward op on arguments of plain types, in the order of its schema; NotImplemented for any other."},
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
