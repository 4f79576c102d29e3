// Two devices for tests: their memory is the host's and their kernels are the CPU's, but to PyTorch they are not the CPU.
//
// Operations that mix their tensors with the CPU's or with each other's are refused, as on GPUs, and so are generators of
// the CPU. Whenever the host asks for a value, a GPU would be waited for: that is counted. They can be told to refuse
// float64, as Apple's GPUs do.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorShape.h>
#include <c10/core/Allocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr auto kAnother = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kDevices = 2;
thread_local c10::DeviceIndex current = 0;
c10::Device here() { return c10::Device(kAnother, current); }
c10::Device indexed(c10::Device device) { return device.has_index() ? device : here(); }
bool has_float64 = true;
int64_t readings = 0;  // how often the host has asked for a value since the last time it was told

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = size ? c10::alloc_cpu(size) : nullptr;
    return {data, data, &c10::free_cpu, here()};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, std::size_t size) const override { default_copy_data(to, from, size); }
};
Memory memory;
REGISTER_ALLOCATOR(kAnother, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kAnother; }
  c10::Device exchangeDevice(c10::Device device) const override {
    return c10::Device(kAnother, std::exchange(current, indexed(device).index()));
  }
  c10::Device getDevice() const override { return here(); }
  void setDevice(c10::Device device) const override { exchangeDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { exchangeDevice(device); }
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, indexed(device)); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }

  // Work is done when the call that asks for it returns: nothing is to be waited for.
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  void synchronizeEvent(void*) const override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Generator final : at::CPUGeneratorImpl {
  explicit Generator(c10::DeviceIndex index) : at::CPUGeneratorImpl(c10::default_rng_seed_val) {
    device_ = c10::Device(kAnother, index);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};

const at::Generator& default_generator(c10::DeviceIndex index) {
  static const at::Generator generators[kDevices] = {at::make_generator<Generator>(0), at::make_generator<Generator>(1)};
  return generators[index < 0 ? current : index];
}

struct Hooks final : at::PrivateUse1HooksInterface {
  Hooks() { at::RegisterPrivateUse1HooksInterface(this); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return at::make_generator<Generator>(index < 0 ? current : index);
  }
  at::Device getDeviceFromPtr(void*) const override { return here(); }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex index) const override { current = index; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override { return std::exchange(current, index); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return exchangeDevice(index); }
  bool isPinnedPtr(const void*) const override { return true; }  // all memory is the host's
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  void init() const override {}
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    auto* held = storage.unsafeGetStorageImpl();
    auto data = memory.allocate(size);
    if (held->data() != nullptr) std::memcpy(data.get(), held->data(), std::min(size, held->nbytes()));
    held->set_data_ptr_noswap(std::move(data));
    held->set_nbytes(size);
  }
};
Hooks hooks;

void check_dtype(std::optional<at::ScalarType> dtype) {
  TORCH_CHECK_TYPE(has_float64 || c10::dtype_or_default(dtype) != at::kDouble, "another device: it has no float64");
}

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  check_dtype(dtype);
  const c10::DeviceGuard guard(indexed(device.value_or(here())));
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory,
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype),
                                   format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  check_dtype(dtype);
  const c10::DeviceGuard guard(indexed(device.value_or(here())));
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

// The same memory, as a tensor of the CPU.
at::Tensor on_host(const at::Tensor& tensor) {
  if (tensor.device().type() != kAnother) return tensor;
  const auto options = tensor.options().device(at::kCPU);
  if (!tensor.numel()) return at::empty_strided(tensor.sizes(), tensor.strides(), options);
  return at::from_blob(tensor.mutable_data_ptr(), tensor.sizes(), tensor.strides(), [tensor](void*) {}, options);
}

at::Tensor from_host(const at::Tensor& host, c10::Device device) {
  if (!host.defined() || host.device().type() != at::kCPU) return host;
  auto made = at::empty_strided(host.sizes(), host.strides(), host.options().device(device));
  if (host.numel()) on_host(made).copy_(host);
  return made;
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  self.unsafeGetTensorImpl()->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  const size_t bytes = (self.storage_offset() + self.numel()) * self.itemsize();
  if (self.storage().nbytes() < bytes) hooks.resizePrivateUse1Bytes(self.storage(), bytes);
  return self;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  readings += to.device().type() == at::kCPU;
  on_host(to).copy_(on_host(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar_dense(const at::Tensor& tensor) {
  ++readings;
  return on_host(tensor).item();
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                        c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(offset.expect_int());
  if (stride.size() == size.size()) {
    impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
  } else {
    impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  }
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage source) {
  const c10::SymInt count = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_storage(self, std::move(source), 0, {count}, {c10::SymInt(1)});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.sym_storage_offset(), source.sym_sizes(), source.sym_strides());
}

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  const auto start = offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return as_strided(self, size, stride, std::nullopt);
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor unfold(const at::Tensor& self, int64_t dimension, int64_t size, int64_t step) {
  return at::native::unfold(self, dimension, size, step);
}

// Runs every other operation on the CPU, on the same memory.
class OnTheCpu {
 public:
  OnTheCpu(const c10::OperatorHandle& op, torch::jit::Stack* stack)
      : op_(op), stack_(stack), name_(op.schema().name()), first_(stack->size() - op.schema().arguments().size()) {}

  void run() {
    const std::vector<c10::IValue> given(stack_->begin() + first_, stack_->end());
    for (size_t place = 0; place < given.size(); ++place) translate(op_.schema().arguments()[place], given[place]);
    check_devices();
    draw_and_call();
    for (auto& [host, tensor] : written_) {
      if (host.numel() && host.data_ptr() == tensor.data_ptr()) continue;
      if (host.sizes() != tensor.sizes()) resize(tensor, host.sym_sizes(), std::nullopt);
      if (host.numel()) on_host(tensor).copy_(host);
    }
    for (size_t place = 0; place < op_.schema().returns().size(); ++place) give_back(place, given);
  }

  // A collective writes into the tensors that it was given, perhaps later: nothing is to be moved back.
  void start() {
    for (size_t place = 0; place < op_.schema().arguments().size(); ++place) {
      translate(op_.schema().arguments()[place], (*stack_)[first_ + place]);
    }
    check_devices();
    op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack_);
  }

 private:
  void check_devices() const {
    TORCH_CHECK(!mixed_ && !(ours_ && hosts_), name_, ": expected tensors on one device, got ", seen_);
  }

  void take(c10::Device device) {
    if (device.type() != kAnother) return;
    mixed_ |= ours_ && *ours_ != indexed(device);
    ours_ = indexed(device);
  }

  void look(const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    take(tensor.device());
    hosts_ |= tensor.device().type() == at::kCPU && tensor.dim() > 0;  // a number of the CPU goes anywhere
    seen_ += tensor.device().str() + c10::str(tensor.sizes()) + " ";
  }

  at::Tensor host(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.device().type() != kAnother) return tensor;
    auto alias = on_host(tensor);
    written_.emplace_back(alias, tensor);
    return alias;
  }

  void translate(const c10::Argument& argument, const c10::IValue given) {
    auto& value = (*stack_)[first_ + (&argument - op_.schema().arguments().data())];
    const bool out = argument.kwarg_only() && argument.alias_info() != nullptr && argument.alias_info()->isWrite();
    if (given.isTensor() && out && given.toTensor().device().type() == kAnother) {
      take(given.toTensor().device());  // of any size: it is resized
      written_.emplace_back(at::empty({0}, given.toTensor().options().device(at::kCPU)), given.toTensor());
      value = written_.back().first;
    } else if (given.isTensor()) {
      look(given.toTensor());
      value = host(given.toTensor());
    } else if (given.isTensorList()) {
      std::vector<at::Tensor> all;
      for (const auto& tensor : given.toTensorVector()) {
        look(tensor);
        all.push_back(host(tensor));
      }
      value = all;
    } else if (given.isList() && *given.toList().elementType() == *c10::ListType::ofTensors()) {
      c10::List<c10::List<at::Tensor>> all;
      for (const c10::List<at::Tensor> some : given.to<c10::List<c10::List<at::Tensor>>>()) {
        c10::List<at::Tensor> hosts;
        for (const at::Tensor tensor : some) {
          look(tensor);
          hosts.push_back(host(tensor));
        }
        all.push_back(hosts);
      }
      value = all;
    } else if (given.isOptionalTensorList()) {  // indices, which may lie on the CPU
      c10::List<std::optional<at::Tensor>> all;
      for (const auto& tensor : given.toOptionalTensorVector()) {
        all.push_back(tensor ? std::optional<at::Tensor>(host(*tensor)) : std::nullopt);
      }
      value = all;
    } else if (given.isDevice()) {
      take(given.toDevice());
      value = at::Device(at::kCPU);
    } else if (given.isGenerator() && given.toGenerator().defined()) {
      generator_ = given.toGenerator();
      TORCH_CHECK(generator_.device().type() == kAnother, name_, ": expected a generator of this device, got the CPU's");
      take(generator_.device());
      value = at::make_generator<at::CPUGeneratorImpl>();
      value.toGenerator().set_state(generator_.get_state());
      drawn_from_ = value.toGenerator();
    }
  }

  // What draws without a generator draws from this device's own, not from the CPU's.
  void draw_and_call() {
    const auto cpu = c10::DispatchKeySet(c10::DispatchKey::CPU);
    if (generator_.defined() || !op_.hasTag(at::Tag::nondeterministic_seeded)) {
      op_.redispatchBoxed(cpu, stack_);
      if (generator_.defined()) generator_.set_state(drawn_from_.get_state());
      return;
    }
    at::Generator own = default_generator(ours_ ? ours_->index() : current), of_cpu = at::detail::getDefaultCPUGenerator();
    const auto kept = of_cpu.get_state();
    of_cpu.set_state(own.get_state());
    op_.redispatchBoxed(cpu, stack_);
    own.set_state(of_cpu.get_state());
    of_cpu.set_state(kept);
  }

  void give_back(size_t place, const std::vector<c10::IValue>& given) {
    const auto& schema = op_.schema();
    auto& value = (*stack_)[stack_->size() - schema.returns().size() + place];
    const auto* alias = schema.returns()[place].alias_info();
    if (alias != nullptr && alias->isWrite()) {
      for (size_t argument = 0; argument < given.size(); ++argument) {
        const auto* other = schema.arguments()[argument].alias_info();
        if (other != nullptr && *other == *alias) value = given[argument];
      }
    } else if (ours_ && value.isTensor()) {
      value = from_host(value.toTensor(), *ours_);
    } else if (ours_ && value.isTensorList()) {
      std::vector<at::Tensor> all;
      for (const auto& tensor : value.toTensorVector()) all.push_back(from_host(tensor, *ours_));
      value = all;
    }
  }

  const c10::OperatorHandle& op_;
  torch::jit::Stack* stack_;
  const std::string name_;
  const size_t first_;
  std::optional<c10::Device> ours_;
  bool mixed_ = false, hosts_ = false;
  std::string seen_;
  std::vector<std::pair<at::Tensor, at::Tensor>> written_;
  at::Generator generator_, drawn_from_;
};

void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) { OnTheCpu(op, stack).run(); }
void over_the_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) { OnTheCpu(op, stack).start(); }

int64_t take_readings() { return std::exchange(readings, 0); }
void allow_float64(bool allowed) { has_float64 = allowed; }
at::Tensor get_state(int64_t index) { return default_generator(index).get_state(); }
void set_state(const at::Tensor& state, int64_t index) { at::Generator(default_generator(index)).set_state(state); }
void seed(int64_t value) {
  for (c10::DeviceIndex index = 0; index < kDevices; ++index) {
    at::Generator(default_generator(index)).set_current_seed(value);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", unfold);
  m.impl("resize_", resize);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }

// As a GPU's: what multiplies matrices takes the narrow numbers, what sums takes the wide ones.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(layer_norm, fp32)
  KERNEL_PRIVATEUSEONE(cross_entropy_loss, fp32)
}

// What processes say to one another, over the host's memory: gloo does so.
TORCH_LIBRARY_IMPL(c10d, PrivateUse1, m) {
  for (const char* name :
       {"allreduce_", "allreduce_coalesced_", "allgather_", "_allgather_base_", "allgather_coalesced_",
        "allgather_into_tensor_coalesced_", "broadcast_", "reduce_", "reduce_scatter_", "_reduce_scatter_base_",
        "reduce_scatter_tensor_coalesced_", "gather_", "scatter_", "alltoall_", "alltoall_base_", "barrier", "send",
        "recv_"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&over_the_host>());
  }
}

TORCH_LIBRARY(another, m) {
  m.def("take_readings() -> int", take_readings);
  m.def("allow_float64(bool allowed) -> ()", allow_float64);
  m.def("get_state(int index) -> Tensor", get_state);
  m.def("set_state(Tensor state, int index) -> ()", set_state);
  m.def("seed(int value) -> ()", seed);
}
