// The Python face of block_sparse_attention.h. Tensors come as addresses and strides: no header of torch is needed, so
// one build serves every version of it. svggt_kernels/backends/cpu checks shapes and keeps tensors alive.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "block_sparse_attention.h"
#include "kernel.h"

namespace py = pybind11;

namespace {

// (address, batch stride, head stride, token stride)
using TensorTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;
// (address, number of int64 entries) of each table
using WalkTuple = std::array<std::pair<uintptr_t, int64_t>, 6>;
using ShapeTuple = std::array<int64_t, 5>;
// (instruction set, whether it is bfloat16, threads)
using OptionsTuple = std::tuple<std::string, bool, int>;

svggt::Tensor tensor(const TensorTuple& x) {
  return {reinterpret_cast<void*>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x)};
}

svggt::Walk walk(const WalkTuple& tables) {
  const auto table = [&](int i) -> svggt::Table {
    return {reinterpret_cast<const int64_t*>(tables[i].first), tables[i].second};
  };
  return {table(0), table(1), table(2), table(3), table(4), table(5)};
}

svggt::Shape shape(const ShapeTuple& x) { return {x[0], x[1], x[2], x[3], x[4]}; }

svggt::Options options(const OptionsTuple& x) {
  return {std::get<0>(x), std::get<1>(x) ? svggt::Dtype::bfloat16 : svggt::Dtype::float32, std::get<2>(x)};
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Block-sparse attention on the CPU.";
  module.attr("MOST_ROWS") = svggt::kMostRows;
  module.attr("MOST_COLUMNS") = svggt::kMostColumns;
  module.def("instruction_sets", &svggt::instruction_sets);
  module.def("why_amx_is_unused", &svggt::why_amx_is_unused);
  module.def("has_bfloat16", [](const std::string& set) { return svggt::supports(set, svggt::Dtype::bfloat16); });
  module.def("forward", [](const TensorTuple& q, const TensorTuple& k, const TensorTuple& v, const TensorTuple& out,
                           const TensorTuple& lse, const WalkTuple& tables, const ShapeTuple& sizes, float scale,
                           const OptionsTuple& how) {
    const py::gil_scoped_release release;
    svggt::forward(tensor(q), tensor(k), tensor(v), tensor(out), tensor(lse), walk(tables), shape(sizes), scale,
                   options(how));
  });
  module.def("backward", [](const TensorTuple& q, const TensorTuple& k, const TensorTuple& v, const TensorTuple& grad,
                            const TensorTuple& lse, const TensorTuple& inner, const TensorTuple& dq,
                            const TensorTuple& dk, const TensorTuple& dv, const WalkTuple& tables,
                            const ShapeTuple& sizes, float scale, const OptionsTuple& how) {
    const py::gil_scoped_release release;
    svggt::backward(tensor(q), tensor(k), tensor(v), tensor(grad), tensor(lse), tensor(inner), tensor(dq), tensor(dk),
                    tensor(dv), walk(tables), shape(sizes), scale, options(how));
  });
}
