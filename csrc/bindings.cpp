// fastmllm._planner: plans that the host makes. The only pybind11 file; operators never go through it.
#include "planner.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

PYBIND11_MODULE(_planner, m) {
  m.doc() = "Plans that the host makes.";
  m.def("pack_first_fit", &fastmllm::pack_first_fit, pybind11::arg("lengths"), pybind11::arg("capacity"),
        "Pack items into bins by first-fit decreasing, ties in the given order.\n\n"
        "Args:\n    lengths: the size of each item, in tokens.\n    capacity: the size of a bin, in tokens.\n\n"
        "Returns:\n    Bins in the order they were opened, each the ascending indices of its items.\n\n"
        "Raises:\n    ValueError: an item is negative or larger than a bin (its index is named).");
}
