// What Python's trees are made of: dicts, sequences and arrays.
#pragma once

#include <nanobind/nanobind.h>
// In every file that casts strings: without it nanobind takes std::string for a
// class of ours, and the linker may keep that version.
#include <nanobind/stl/string.h>

#include "graph/layout.h"

namespace mlx_fused_optim {

namespace nb = nanobind;

/// A value of a dict, borrowed, or a null handle.
inline nb::handle lookup(nb::handle dict, nb::handle key) {
  PyObject* value = PyDict_GetItemWithError(dict.ptr(), key.ptr());
  if (!value && PyErr_Occurred()) {
    throw nb::python_error();
  }
  return value;
}

inline bool is_sequence(nb::handle tree) {
  return PyList_Check(tree.ptr()) || PyTuple_Check(tree.ptr());
}

inline nb::object item(nb::handle sequence, size_t i) {
  PyObject* object = PyList_Check(sequence.ptr()) ? PyList_GetItem(sequence.ptr(), i)
                                                  : PyTuple_GetItem(sequence.ptr(), i);
  if (!object) {
    nb::raise_python_error();
  }
  return nb::borrow(object);
}

// The type is looked up once: a tree has hundreds of leaves.
inline bool is_array(nb::handle object) {
  static PyObject* const array_type = nb::type<mx::array>().ptr();
  return object.type().ptr() == array_type && nb::inst_ready(object);
}

inline const mx::array& array_of(nb::handle object) { return *nb::inst_ptr<mx::array>(object); }

/// Of an array: integers are data, such as the weights of a quantized layer.
inline bool is_integer(const mx::array& array) {
  return array.dtype() == mx::bool_ || mx::issubdtype(array.dtype(), mx::integer);
}

inline bool is_trainable(mx::Dtype dtype) {
  return dtype == mx::float32 || dtype == mx::float16 || dtype == mx::bfloat16;
}

} // namespace mlx_fused_optim
