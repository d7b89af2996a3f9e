#include "h5md_objects.h"

#include "h5md_file.h"

#include <algorithm>
#include <limits>

namespace h5md_objects {

namespace {

constexpr hsize_t SERIES_CHUNK = 256;              // frames per chunk of step, time and box
constexpr hsize_t SMALLEST_ATOM_CHUNK = 64;        // a group may start empty and grow
constexpr hsize_t LARGEST_ATOM_CHUNK = 1 << 18;    // 3 MiB of single precision positions
constexpr int64_t CHUNK_ENTRY_BYTES = 128;         // B-tree entry of one chunk, nodes half full

hid_t hdf5_type(int type)
{
  switch (type) {
  case HLGAUSS_H5MD_INT16:
    return H5T_NATIVE_INT16;
  case HLGAUSS_H5MD_INT32:
    return H5T_NATIVE_INT32;
  case HLGAUSS_H5MD_INT64:
    return H5T_NATIVE_INT64;
  case HLGAUSS_H5MD_FLOAT32:
    return H5T_NATIVE_FLOAT;
  default:
    return H5T_NATIVE_DOUBLE;
  }
}

/// Marks an atom that is not there in a frame with fewer atoms than others: NaN, or -1.
void set_fill_value(hid_t creation, int type)
{
  if (type == HLGAUSS_H5MD_FLOAT32 || type == HLGAUSS_H5MD_FLOAT64) {
    const double missing = std::numeric_limits<double>::quiet_NaN();
    checked(H5Pset_fill_value(creation, H5T_NATIVE_DOUBLE, &missing), "fill value");
  } else {
    const int missing = -1;
    checked(H5Pset_fill_value(creation, H5T_NATIVE_INT, &missing), "fill value");
  }
}

}    // namespace

std::string hdf5_reason()
{
  std::string reason;
  H5Ewalk2(
      H5E_DEFAULT, H5E_WALK_UPWARD,
      [](unsigned, const H5E_error2_t *entry, void *out) -> herr_t {
        auto &text = *static_cast<std::string *>(out);
        if (text.empty() && entry->desc) text = entry->desc;
        return 0;
      },
      &reason);
  H5Eclear2(H5E_DEFAULT);
  return reason.empty() ? "no reason given" : reason;
}

Handle string_type()
{
  Handle type(H5Tcopy(H5T_C_S1), "string type");
  checked(H5Tset_size(type, H5T_VARIABLE), "string type");
  checked(H5Tset_cset(type, H5T_CSET_UTF8), "string type");
  return type;
}

void write_attribute(hid_t object, const char *name, const std::string &value)
{
  const Handle type = string_type();
  const Handle space(H5Screate(H5S_SCALAR), "attribute space");
  const Handle attribute(H5Acreate2(object, name, type, space, H5P_DEFAULT, H5P_DEFAULT), name);
  const char *text = value.c_str();
  checked(H5Awrite(attribute, type, &text), name);
}

void write_attribute(hid_t object, const char *name, hid_t type, const void *values, hsize_t count)
{
  const Handle space(count ? H5Screate_simple(1, &count, nullptr) : H5Screate(H5S_SCALAR),
                     "attribute space");
  const Handle attribute(H5Acreate2(object, name, type, space, H5P_DEFAULT, H5P_DEFAULT), name);
  checked(H5Awrite(attribute, type, values), name);
}

std::string read_attribute(hid_t object, const char *name)
{
  if (H5Aexists(object, name) <= 0) return "";
  const Handle attribute(H5Aopen(object, name, H5P_DEFAULT), name);
  const Handle found(H5Aget_type(attribute), name);
  if (H5Tis_variable_str(found) <= 0) return "";
  const Handle type = string_type();
  char *text = nullptr;
  checked(H5Aread(attribute, type, &text), name);
  std::string value = text ? text : "";
  H5free_memory(text);
  return value;
}

Handle create_group(hid_t parent, const char *name)
{
  return {H5Gcreate2(parent, name, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT), name};
}

void write_text(hid_t parent, const char *name, const std::string &text)
{
  const Handle type(H5Tcopy(H5T_C_S1), "string type");
  checked(H5Tset_size(type, std::max<size_t>(text.size(), 1)), "string type");
  checked(H5Tset_strpad(type, H5T_STR_NULLPAD), "string type");
  checked(H5Tset_cset(type, H5T_CSET_UTF8), "string type");
  const Handle space(H5Screate(H5S_SCALAR), "text space");
  const Handle dataset(H5Dcreate2(parent, name, type, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT),
                       name);
  checked(H5Dwrite(dataset, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, text.c_str()), name);
}

std::vector<std::string> links_of(hid_t group)
{
  std::vector<std::string> names;
  checked(H5Literate(
              group, H5_INDEX_NAME, H5_ITER_INC, nullptr,
              [](hid_t, const char *name, const H5L_info_t *, void *out) -> herr_t {
                static_cast<std::vector<std::string> *>(out)->emplace_back(name);
                return 0;
              },
              &names),
          "listing a group");
  return names;
}

Series::Series(hid_t parent, const char *name, int type, std::vector<hsize_t> frame, bool atoms,
               int compress) :
    type_(type),
    frame_(std::move(frame)), atoms_(atoms)
{
  std::vector<hsize_t> dims(1, 0), limit(1, H5S_UNLIMITED), chunk(1, atoms ? 1 : SERIES_CHUNK);
  dims.insert(dims.end(), frame_.begin(), frame_.end());
  limit.insert(limit.end(), frame_.begin(), frame_.end());
  chunk.insert(chunk.end(), frame_.begin(), frame_.end());
  if (atoms) {
    limit[1] = H5S_UNLIMITED;
    const hsize_t pieces = std::max<hsize_t>(1, (frame_[0] - 1) / LARGEST_ATOM_CHUNK + 1);
    chunk[1] = std::max(SMALLEST_ATOM_CHUNK, (frame_[0] + pieces - 1) / pieces);
  }
  const Handle space(H5Screate_simple(static_cast<int>(dims.size()), dims.data(), limit.data()),
                     name);
  const Handle creation(H5Pcreate(H5P_DATASET_CREATE), name);
  checked(H5Pset_chunk(creation, static_cast<int>(chunk.size()), chunk.data()), name);
  set_fill_value(creation, type);
  if (compress) {
    checked(H5Pset_shuffle(creation), name);
    checked(H5Pset_deflate(creation, compress), name);
  }
  dataset_ = Handle(
      H5Dcreate2(parent, name, hdf5_type(type), space, H5P_DEFAULT, creation, H5P_DEFAULT), name);
  atom_chunk_ = atoms ? chunk[1] : 1;
}

Series Series::open(hid_t parent, const char *name, int type, const std::vector<hsize_t> &frame,
                    bool atoms, const std::string &label)
{
  Series series;
  series.type_ = type;
  series.frame_ = frame;
  series.atoms_ = atoms;
  series.dataset_ = Handle(H5Dopen2(parent, name, H5P_DEFAULT), label.c_str());
  const Handle found(H5Dget_type(series.dataset_), name);
  if (H5Tequal(found, hdf5_type(type)) <= 0)
    throw Failure(label + " has another number type (precision single or double?)");
  const std::vector<hsize_t> dims = series.dims();
  if (dims.size() != frame.size() + 1) throw Failure(label + " has another shape");
  for (size_t k = atoms ? 2 : 1; k < dims.size(); k++)
    if (dims[k] != frame[k - 1]) throw Failure(label + " has another shape");
  const Handle creation(H5Dget_create_plist(series.dataset_), name);
  std::vector<hsize_t> chunk(dims.size());
  if (H5Pget_chunk(creation, static_cast<int>(chunk.size()), chunk.data()) < 0)
    throw Failure(label + " cannot grow: it is not chunked");
  if (atoms) {
    series.frame_[0] = dims[1];
    series.atom_chunk_ = chunk[1];
  }
  return series;
}

void Series::cut(hsize_t frames)
{
  std::vector<hsize_t> extent = dims();
  if (extent[0] <= frames) return;
  extent[0] = frames;
  checked(H5Dset_extent(dataset_, extent.data()), "cutting frames");
}

int64_t Series::bytes(hsize_t atoms) const
{
  if (!atoms_) return 0;
  int64_t size = static_cast<int64_t>(H5Tget_size(hdf5_type(type_)));
  for (size_t k = 1; k < frame_.size(); k++) size *= static_cast<int64_t>(frame_[k]);
  const auto chunks = static_cast<int64_t>((atoms + atom_chunk_ - 1) / atom_chunk_);
  const int64_t data = chunks * static_cast<int64_t>(atom_chunk_) * size;
  return data + data / 500 + chunks * CHUNK_ENTRY_BYTES;    // deflate may add 0.1 %
}

void Series::write(hsize_t frame, const void *values, hsize_t atoms, hsize_t capacity)
{
  if (atoms_) frame_[0] = std::max(frame_[0], capacity);
  std::vector<hsize_t> extent(1, frame + 1), start(1, frame), count(1, 1);
  extent.insert(extent.end(), frame_.begin(), frame_.end());
  start.insert(start.end(), frame_.size(), 0);
  count.insert(count.end(), frame_.begin(), frame_.end());
  if (atoms_) count[1] = atoms;
  checked(H5Dset_extent(dataset_, extent.data()), "growing a dataset");
  if (atoms_ && atoms == 0) return;
  const int rank = static_cast<int>(count.size());
  const Handle memory(H5Screate_simple(rank, count.data(), nullptr), "memory space");
  const Handle target(H5Dget_space(dataset_), "file space");
  checked(H5Sselect_hyperslab(target, H5S_SELECT_SET, start.data(), nullptr, count.data(), nullptr),
          "selection");
  checked(H5Dwrite(dataset_, hdf5_type(type_), memory, target, H5P_DEFAULT, values), "writing");
}

std::vector<hsize_t> Series::dims() const
{
  const Handle space(H5Dget_space(dataset_), "file space");
  std::vector<hsize_t> dims(checked(H5Sget_simple_extent_ndims(space), "file space"));
  checked(H5Sget_simple_extent_dims(space, dims.data(), nullptr), "file space");
  return dims;
}

}    // namespace h5md_objects
