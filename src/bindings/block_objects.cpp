// Block operations over an engine's own block objects, in one call for a whole list.
//
// An engine that counts references in Python objects would pay a Python loop for each list of ids; here the loop runs
// in C++. The objects need the attributes block_id, ref_cnt, is_null, _block_hash and pool.
#include "block_objects.hpp"

#include <nanobind/stl/shared_ptr.h>

#include "pool/pool.hpp"

namespace elastickv::py {
namespace {

struct Names {
    PyObject *block_id = PyUnicode_InternFromString("block_id");
    PyObject *ref_cnt = PyUnicode_InternFromString("ref_cnt");
    PyObject *is_null = PyUnicode_InternFromString("is_null");
    PyObject *block_hash = PyUnicode_InternFromString("_block_hash");
    PyObject *pool = PyUnicode_InternFromString("pool");
};

const Names &names() {
    static const Names *all = new Names;  // lives as long as the interpreter
    return *all;
}

nb::object get(PyObject *object, PyObject *name) {
    PyObject *value = PyObject_GetAttr(object, name);
    if (value == nullptr) throw nb::python_error();
    return nb::steal(value);
}

void set(PyObject *object, PyObject *name, PyObject *value) {
    if (PyObject_SetAttr(object, name, value) != 0) throw nb::python_error();
}

long as_long(const nb::object &value) {
    const long out = PyLong_AsLong(value.ptr());
    if (out == -1 && PyErr_Occurred()) throw nb::python_error();
    return out;
}

class BlockObjects {
  public:
    explicit BlockObjects(std::shared_ptr<Pool> pool) : pool_(std::move(pool)), one_(nb::steal(PyLong_FromLong(1))) {}

    // (objects, evicted): each with ref_cnt 1; the last `evicted` were cached and still carry their hash. `blocks`: all
    // of the pool's objects, by id. They are not kept: each names its pool, which holds this object, and Python's
    // collector does not see through it.
    nb::tuple take(nb::list blocks, std::uint32_t n) {
        if (nb::len(blocks) != pool_->options().num_blocks)
            raise({Code::invalid, std::to_string(nb::len(blocks)) + " block objects for a pool of " +
                                      std::to_string(pool_->options().num_blocks) + " blocks"});
        ids_.resize(n);
        const std::uint32_t evicted = unwrap(pool_->take(ids_));
        PyObject *list = PyList_New(static_cast<Py_ssize_t>(n));
        if (list == nullptr) throw nb::python_error();
        nb::object owner = nb::steal(list);
        for (std::uint32_t i = 0; i < n; ++i) {
            PyObject *block = PyList_GetItem(blocks.ptr(), static_cast<Py_ssize_t>(ids_[i]));
            if (block == nullptr) throw nb::python_error();
            set(block, names().ref_cnt, one_.ptr());
            Py_INCREF(block);
            PyList_SetItem(list, static_cast<Py_ssize_t>(i), block);
        }
        return nb::make_tuple(owner, evicted);
    }

    // One reference less each; at none, free or (with a hash, while `caching`) cached. Returns the objects whose
    // `pool` is not `owner`: they are somebody else's and untouched.
    nb::list free(nb::iterable ordered, bool caching, nb::handle owner) {
        nb::list foreign;
        ids_.clear();
        cached_.clear();
        for (nb::handle block : ordered) {
            const nb::object pool = get(block.ptr(), names().pool);
            if (!pool.is_none() && !pool.is(owner)) {
                foreign.append(block);
                continue;
            }
            const long count = as_long(get(block.ptr(), names().ref_cnt)) - 1;
            set(block.ptr(), names().ref_cnt, nb::steal(PyLong_FromLong(count)).ptr());
            if (count != 0 || get(block.ptr(), names().is_null).ptr() == Py_True) continue;
            const auto id = static_cast<std::uint32_t>(as_long(get(block.ptr(), names().block_id)));
            const bool keep = caching && !get(block.ptr(), names().block_hash).is_none();
            (keep ? cached_ : ids_).push_back(id);
        }
        check(pool_->release(ids_, false));
        check(pool_->release(cached_, true));
        return foreign;
    }

    void touch(nb::iterable blocks) {
        for (nb::handle block : blocks) {
            const long count = as_long(get(block.ptr(), names().ref_cnt));
            if (count == 0 && get(block.ptr(), names().is_null).ptr() != Py_True)
                check(pool_->touch(static_cast<std::uint32_t>(as_long(get(block.ptr(), names().block_id)))));
            set(block.ptr(), names().ref_cnt, nb::steal(PyLong_FromLong(count + 1)).ptr());
        }
    }

  private:
    std::shared_ptr<Pool> pool_;
    nb::object one_;
    std::vector<std::uint32_t> ids_, cached_;  // kept to spare allocations; calls come under the GIL, one at a time
};

}  // namespace

void bind_block_objects(nb::module_ &module) {
    nb::class_<BlockObjects>(module, "BlockObjects", "A pool's operations over an engine's own block objects.")
        .def(nb::init<std::shared_ptr<Pool>>(), nb::arg("pool"))
        .def("take", &BlockObjects::take, nb::arg("blocks"), nb::arg("n"),
             nb::sig("def take(self, blocks: list, n: int) -> tuple[list, int]"))
        .def("free", &BlockObjects::free, nb::arg("ordered_blocks"), nb::arg("caching"), nb::arg("owner"))
        .def("touch", &BlockObjects::touch, nb::arg("blocks"));
}

}  // namespace elastickv::py
