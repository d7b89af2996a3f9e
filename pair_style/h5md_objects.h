// HDF5 objects as the writer of trajectories uses them: owned identifiers, attributes, and datasets
// that grow by one row per frame. Every failure is thrown with HDF5's own reason.

#ifndef LMP_HLGAUSS_H5MD_OBJECTS_H
#define LMP_HLGAUSS_H5MD_OBJECTS_H

#include <hdf5.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace h5md_objects {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Innermost line of HDF5's error stack.
std::string hdf5_reason();

/// Throw when an HDF5 call returned a negative value; give the value back otherwise.
template <typename T> T checked(T result, const char *what)
{
  if (result < 0) throw Failure(std::string(what) + ": " + hdf5_reason());
  return result;
}

/// Owns one HDF5 identifier of any kind.
class Handle {
public:
  Handle() = default;
  Handle(hid_t id, const char *what) : id_(checked(id, what)) {}
  Handle(Handle &&other) noexcept : id_(other.id_) { other.id_ = -1; }
  Handle &operator=(Handle &&other) noexcept
  {
    std::swap(id_, other.id_);
    return *this;
  }
  Handle(const Handle &) = delete;
  Handle &operator=(const Handle &) = delete;
  ~Handle()
  {
    if (id_ >= 0) H5Idec_ref(id_);
  }
  operator hid_t() const { return id_; }
  void abandon() { id_ = -1; }    // never give it back to HDF5

private:
  hid_t id_ = -1;
};

Handle string_type();

void write_attribute(hid_t object, const char *name, const std::string &value);

/// count: number of values; 0 for a scalar.
void write_attribute(hid_t object, const char *name, hid_t type, const void *values, hsize_t count);

/// A variable-length string attribute, or "" when there is none.
std::string read_attribute(hid_t object, const char *name);

Handle create_group(hid_t parent, const char *name);

/// A fixed-length string dataset: of any size, unlike an attribute.
void write_text(hid_t parent, const char *name, const std::string &text);

/// Names of what is in a group.
std::vector<std::string> links_of(hid_t group);

/// A dataset that grows by one row per frame.
class Series {
public:
  Series() = default;

  /// Create it. type: hlgauss_h5md_type; frame: shape of one frame; `atoms` makes the first of them
  /// growable; compress: gzip level or 0.
  Series(hid_t parent, const char *name, int type, std::vector<hsize_t> frame, bool atoms,
         int compress);

  /// Open an existing one and check that it is what the constructor above would make.
  static Series open(hid_t parent, const char *name, int type, const std::vector<hsize_t> &frame,
                     bool atoms, const std::string &label);

  hsize_t num_frames() const { return dims()[0]; }
  hsize_t num_atoms() const { return atoms_ ? frame_[0] : 0; }
  hid_t id() const { return dataset_; }
  void abandon() { dataset_.abandon(); }

  void cut(hsize_t frames);

  /// Bytes one frame takes on disk, whole chunks and their index.
  int64_t bytes(hsize_t atoms) const;

  /// Write frame number `frame`; atoms: rows in values, at most `capacity` rows exist in the file.
  void write(hsize_t frame, const void *values, hsize_t atoms = 0, hsize_t capacity = 0);

private:
  std::vector<hsize_t> dims() const;

  Handle dataset_;
  int type_ = 0;
  std::vector<hsize_t> frame_;    // shape of one frame
  bool atoms_ = false;            // first axis of a frame counts atoms
  hsize_t atom_chunk_ = 1;
};

}    // namespace h5md_objects

#endif
