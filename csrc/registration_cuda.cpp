// The module object that makes importing m2mkd_fast._C_cuda load the CUDA kernels, which register themselves in
// cuda/<op>.cu. m2mkd_fast._C has to be loaded first: it holds the schemas.

#include <Python.h>

extern "C" PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
