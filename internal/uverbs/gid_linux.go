package uverbs

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// gidsFromSysfs reads the used entries of a port's GID table of n entries, on kernels that have no command for it. root
// is /sys.
func gidsFromSysfs(root, device string, port uint8, n int) []ib.GIDEntry {
	dir := filepath.Join(root, "class/infiniband", device, "ports", strconv.Itoa(int(port)))
	read := func(name string, slot int) string {
		b, _ := os.ReadFile(filepath.Join(dir, name, strconv.Itoa(slot))) // an empty slot's attributes cannot be read
		return strings.TrimSpace(string(b))
	}
	var list []ib.GIDEntry
	for i := range n {
		gid, err := ib.ParseGID(read("gids", i))
		if err != nil || gid.IsZero() {
			continue
		}
		e := ib.GIDEntry{Index: i, GID: gid, PortNum: port, NetDev: read("gid_attrs/ndevs", i)}
		switch read("gid_attrs/types", i) {
		case "RoCE v2":
			e.Type = ib.GIDRoCEv2
		case "IB/RoCE v1":
			if e.NetDev != "" {
				e.Type = ib.GIDRoCEv1
			}
		}
		list = append(list, e)
	}
	return list
}
