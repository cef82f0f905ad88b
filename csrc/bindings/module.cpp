// The Python module flash_attention._C: what the build has.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/request.h"

namespace fa {
PYBIND11_MODULE(_C, module) {
    module.doc() = "The C core of flash_attention; its ops are torch.ops.flash_attention.*";
    module.attr("version") = FA_VERSION;
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
