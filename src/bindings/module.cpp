#include "convert.hpp"

namespace elastickv::py {

void raise(const Status &status) {
    nb::object make = nb::module_::import_("elastickv.errors").attr("from_code");
    nb::object error = make(code_name(status.code()), status.message());
    PyErr_SetObject(reinterpret_cast<PyObject *>(Py_TYPE(error.ptr())), error.ptr());
    throw nb::python_error();
}

}  // namespace elastickv::py

NB_MODULE(_core, module) {
    // An engine lives until its process ends, and what it holds then is the kernel's to take back.
    nanobind::set_leak_warnings(false);
    module.doc() = "elastickv's native core. Private: use the elastickv package.";
    elastickv::py::watch_interpreter(module);
    elastickv::py::bind_driver(module);
    elastickv::py::bind_ledger(module);
    elastickv::py::bind_pool(module);
    elastickv::py::bind_rank(module);
}
