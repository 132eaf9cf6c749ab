package emulate

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/mlx5emu"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A tree is a folder with what the program finds in the place of the host's RDMA devices: dev and sys in it are /dev and /sys. The
// nodes of devices are empty files in it.
type tree struct{ root string }

// ours are the folders that the program finds in the tree, with all that is below.
var ours = []string{
	"/dev/infiniband",
	"/sys/class/infiniband",
	"/sys/class/infiniband_verbs",
	"/sys/class/infiniband_mad",
	"/sys/class/infiniband_cm",
	cmClass,
}

// The numbers of the kernel's nodes: of uverbs devices, and of the connection manager, whose minor number the kernel takes from those
// that are free.
const (
	verbsMajor = 231
	verbsMinor = 192
	miscMajor  = 10
	cmMinor    = 58
)

const (
	verbsClass = "/sys/class/infiniband_verbs/"
	cmClass    = "/sys/class/misc/rdma_cm"
	nodes      = "/dev/infiniband/"
	cmNode     = nodes + "rdma_cm"
)

func newTree(devices []*mlx5emu.Device) (*tree, error) {
	root, err := os.MkdirTemp("", "ringside-emulate-")
	if err != nil {
		return nil, fmt.Errorf("a folder for the devices' sysfs: %w (TMPDIR names another place)", err)
	}
	t := &tree{root: root}
	// As the kernel says it of a folder that is open, which TMPDIR need not.
	if t.root, err = filepath.EvalSymlinks(root); err == nil {
		t.root, err = filepath.Abs(t.root)
	}
	if err != nil {
		os.RemoveAll(root)
		return nil, fmt.Errorf("a folder for the devices' sysfs: %w", err)
	}
	if err := t.fill(devices); err != nil {
		t.remove()
		return nil, fmt.Errorf("the devices' sysfs: %w", err)
	}
	return t, nil
}

func (t *tree) remove() { os.RemoveAll(t.root) }

func (t *tree) fill(devices []*mlx5emu.Device) error {
	if err := os.Chmod(t.root, 0o755); err != nil {
		return err
	}
	w := writer{root: t.root, made: map[string]bool{}}
	w.file(verbsClass+"abi_version", "6")
	w.dir("/sys/class/infiniband")
	w.dir(nodes)
	w.node(cmNode)
	w.file(cmClass+"/abi_version", strconv.Itoa(abi.RDMA_USER_CM_ABI_VERSION))
	w.file(cmClass+"/dev", fmt.Sprintf("%d:%d", miscMajor, cmMinor))
	w.file("/sys/bus/drivers/mlx5_core/uevent", "") // where the links of devices lead to; not to be found otherwise
	for i, d := range devices {
		node := uverbs(i)
		w.node(nodes + node)
		w.file(verbsClass+node+"/ibdev", d.Name())
		w.file(verbsClass+node+"/dev", fmt.Sprintf("%d:%d", verbsMajor, verbsMinor+i))
		w.file(verbsClass+node+"/abi_version", "1")
		w.link(verbsClass+node+"/device", "../../infiniband/"+d.Name()+"/device")
		w.device("/sys/class/infiniband/"+d.Name()+"/", d)
	}
	return w.err
}

func uverbs(i int) string { return "uverbs" + strconv.Itoa(i) }

// device writes a device's folder, as far as libibverbs, its tools and perftest read it.
func (w *writer) device(at string, d *mlx5emu.Device) {
	guid := colons(d.GUID().String())
	w.file(at+"node_type", "1: CA")
	w.file(at+"node_guid", guid)
	w.file(at+"sys_image_guid", guid)
	w.file(at+"node_desc", "emulated by ringside")
	w.file(at+"fw_ver", mlx5emu.FirmwareVersion)
	w.file(at+"hw_rev", "0")
	w.file(at+"hca_type", "MT4125")
	w.file(at+"board_id", mlx5emu.BoardID)
	w.file(at+"device/modalias", mlx5emu.Modalias)
	w.file(at+"device/vendor", "0x15b3")
	w.file(at+"device/device", "0x101d")
	w.file(at+"device/numa_node", "-1")
	w.link(at+"device/driver", "../../../../bus/drivers/mlx5_core")
	at += "ports/1/"
	w.file(at+"state", "4: ACTIVE")
	w.file(at+"phys_state", "5: LinkUp")
	w.file(at+"rate", "100 Gb/sec (4X EDR)")
	link, gidType, sm := ib.LinkEthernet, ib.GIDRoCEv2.String(), 0
	if d.LID() != 0 {
		link, gidType, sm = ib.LinkInfiniBand, "IB/RoCE v1", 1
	}
	w.file(at+"link_layer", link.String())
	w.file(at+"lid", fmt.Sprintf("%#x", uint16(d.LID())))
	w.file(at+"sm_lid", fmt.Sprintf("%#x", sm))
	w.file(at+"lid_mask_count", "0")
	w.file(at+"cap_mask", "0x04010000")
	w.file(at+"pkeys/0", "0xffff")
	gids, err := d.GIDs()
	if err != nil && w.err == nil {
		w.err = err
	}
	there := map[int]ib.GIDEntry{}
	for _, g := range gids {
		there[g.Index] = g
	}
	none := "" // an empty entry
	for i := range d.GIDTableSize() {
		g := there[i] // the kernel shows empty entries as zero
		name := at + "gids/" + strconv.Itoa(i)
		if g.GID.IsZero() {
			w.fileLike(name, fullGID(g.GID), &none)
			continue
		}
		w.file(name, fullGID(g.GID))
		w.file(at+"gid_attrs/types/"+strconv.Itoa(i), gidType)
		if g.NetDev != "" {
			w.file(at+"gid_attrs/ndevs/"+strconv.Itoa(i), g.NetDev)
		}
	}
	w.dir(at + "gid_attrs/ndevs")
}

// fullGID is a GID as sysfs has it, with all its digits.
func fullGID(g ib.GID) string {
	s := make([]string, 8)
	for i := range s {
		s[i] = fmt.Sprintf("%02x%02x", g[2*i], g[2*i+1])
	}
	return strings.Join(s, ":")
}

// colons is a GUID as sysfs has it.
func colons(guid string) string { return strings.ToLower(strings.ReplaceAll(guid, "-", ":")) }

// A writer writes files below a root, until the first error.
type writer struct {
	root string
	made map[string]bool // folders
	err  error
}

func (w *writer) do(path string, f func(path string) error) {
	if w.err != nil {
		return
	}
	path = filepath.Join(w.root, path)
	if dir := filepath.Dir(path); !w.made[dir] {
		if w.err = os.MkdirAll(dir, 0o755); w.err != nil {
			return
		}
		w.made[dir] = true
	}
	w.err = f(path)
}

func (w *writer) dir(path string) {
	w.do(path, func(path string) error { return os.MkdirAll(path, 0o755) })
}

func (w *writer) file(path, text string) {
	w.do(path, func(path string) error { return writeFile(path, text) })
}

func writeFile(path, text string) error { return os.WriteFile(path, []byte(text+"\n"), 0o444) }

// fileLike is file for many with the same text, whose first it keeps in one: the others are further names of that, since to write
// hundreds of files is most of what a start takes.
func (w *writer) fileLike(path, text string, one *string) {
	if *one == "" {
		w.file(path, text)
		*one = filepath.Join(w.root, path)
		return
	}
	w.do(path, func(to string) error {
		if os.Link(*one, to) == nil {
			return nil
		}
		return writeFile(to, text) // not all file systems can
	})
}

func (w *writer) link(path, to string) {
	w.do(path, func(path string) error { return os.Symlink(to, path) })
}

func (w *writer) node(path string) {
	w.do(path, func(path string) error {
		if err := os.WriteFile(path, nil, 0o666); err != nil {
			return err
		}
		return os.Chmod(path, 0o666) // whatever the umask
	})
}

// place returns where in the tree an absolute, clean path of the program leads; ok: it is one of ours.
func (t *tree) place(path string) (at string, ok bool) {
	for _, o := range ours {
		if path == o || strings.HasPrefix(path, o) && path[len(o)] == '/' {
			return t.root + path, true
		}
	}
	return "", false
}

// origin is the path by which the program knows a place in the tree, or the path itself if it is elsewhere.
func (t *tree) origin(path string) string {
	if rest, ok := strings.CutPrefix(path, t.root+"/"); ok {
		return "/" + rest
	}
	return path
}

// deviceAt is the number of the device whose node a path of the program names.
func deviceAt(path string, devices int) (int, bool) {
	rest, ok := strings.CutPrefix(path, nodes+"uverbs")
	i, err := strconv.Atoi(rest)
	return i, ok && err == nil && i >= 0 && i < devices && path == nodes+uverbs(i)
}

// rdev is the device number of a device's node.
func rdev(i int) uint64 { return unix.Mkdev(verbsMajor, verbsMinor+uint32(i)) }

// cmRdev is the device number of the connection manager's node.
func cmRdev() uint64 { return unix.Mkdev(miscMajor, cmMinor) }
