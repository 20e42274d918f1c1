// Schemas of every private op, and the module object that makes importing m2mkd_fast._C load them.
//
// An op's kernels register themselves in cpu/<op>.cpp and cuda/<op>.cu; its fake function and its autograd are in
// m2mkd_fast/ops/<op>.py. Names start with an underscore: without the autograd.Function around them these ops have no
// gradient.

#include <Python.h>

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(m2mkd_fast, m) {
  m.def(
      "_latent_affinity_forward(Tensor distance, Tensor bandwidth, float? truncation, bool masked, SymInt? samples,"
      " Tensor? seed, Tensor? uniform, float temperature, float? threshold, bool leaky) -> Tensor");
  m.def(
      "_latent_affinity_backward(Tensor grad, Tensor distance, Tensor bandwidth, float? truncation, bool masked,"
      " Tensor? seed, Tensor? uniform, float temperature) -> (Tensor grad_distance, Tensor grad_bandwidth)");
  m.def(
      "_route_forward(Tensor logits, Tensor? noise, Tensor? seed, float noise_std, int top_k, str gate, int? capacity,"
      " bool batch_priority, int losses) -> (Tensor token, Tensor expert, Tensor weight, Tensor offsets, Tensor place,"
      " Tensor gates, Tensor losses, Tensor choice, Tensor threshold, Tensor slopes, Tensor softmax)");
  m.def(
      "_route_backward(Tensor? grad_weight, Tensor? grad_gates, Tensor? grad_losses, Tensor logits, Tensor gates,"
      " Tensor place, Tensor choice, Tensor threshold, Tensor slopes, Tensor softmax, float noise_std, str gate,"
      " int losses, bool need_noise) -> (Tensor grad_logits, Tensor grad_noise)");
  m.def(
      "_latent_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? log_affinity)"
      " -> (Tensor out, Tensor logsumexp)");
  m.def(
      "_latent_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor? log_affinity,"
      " Tensor out, Tensor logsumexp, bool need_affinity)"
      " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_affinity)");
  m.def(
      "_modulated_norm_forward(Tensor inputs, Tensor weight, Tensor bias, Tensor[] scales, float eps)"
      " -> (Tensor[] outputs, Tensor mean, Tensor rstd)");
  m.def(
      "_modulated_norm_backward(Tensor[] grad_outputs, Tensor inputs, Tensor weight, Tensor bias, Tensor[] scales,"
      " Tensor mean, Tensor rstd) -> (Tensor grad_inputs, Tensor grad_affine, Tensor[] grad_scales)");
  m.def("_modulated_geglu_forward(Tensor hidden, Tensor scale) -> Tensor");
  m.def(
      "_modulated_geglu_backward(Tensor grad_outputs, Tensor hidden, Tensor scale)"
      " -> (Tensor grad_hidden, Tensor grad_scale)");
  m.def(
      "_expert_mlp_forward(Tensor x, Tensor token, Tensor expert, Tensor weight, Tensor offsets, Tensor place,"
      " Tensor up_weight, Tensor? up_bias, Tensor down_weight, Tensor? down_bias, str activation, float hidden_dropout,"
      " float output_dropout, Tensor? seed, bool keep_preactivation) -> (Tensor out, Tensor preactivation)");
  m.def(
      "_expert_mlp_backward(Tensor grad_out, Tensor preactivation, Tensor x, Tensor token, Tensor expert, Tensor weight,"
      " Tensor offsets, Tensor place, Tensor up_weight, Tensor? up_bias, Tensor down_weight, Tensor? down_bias,"
      " str activation, float hidden_dropout, float output_dropout, Tensor? seed, bool need_x, bool need_parameters)"
      " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_up_weight, Tensor grad_up_bias, Tensor grad_down_weight,"
      " Tensor grad_down_bias)");
}

extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
