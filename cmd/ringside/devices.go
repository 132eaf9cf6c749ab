package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/ringside-rdma/ringside/internal/perf"
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
	"github.com/spf13/cobra"
)

// deviceReport is the JSON form of `ringside devices`. Fields may be added.
type deviceReport struct {
	Schema  string       `json:"schema"` // "ringside.devices/1"
	Devices []deviceJSON `json:"devices"`
	// Choice is what programs that name no device get; missing if nothing could be opened.
	Choice *choiceJSON `json:"choice,omitempty"`
	// Path is what --path says, else RINGSIDE_PATH; missing if neither does.
	Path string `json:"path,omitempty"`
	// Problems are what went wrong in the search, with the remedy.
	Problems []string `json:"problems"`

	forced transport.Path // Path, if --path says it: paths are those only
}

const devicesSchema = "ringside.devices/1"

type choiceJSON struct {
	Device string         `json:"device"`
	Reason string         `json:"reason"`
	Passed []verbs.Passed `json:"passed"` // what is better but was not taken, and why
}

type deviceJSON struct {
	Name     string   `json:"name"`
	Provider string   `json:"provider"`
	Tier     string   `json:"tier"`
	GUID     string   `json:"guid"`
	NetDevs  []string `json:"netdevs"`
	CharDevs []string `json:"chardevs"` // what a container needs to be given to use the device
	Chosen   bool     `json:"chosen"`

	// Error says why the device cannot be opened or queried; what follows is then missing.
	Error string     `json:"error,omitempty"`
	Attr  *attrJSON  `json:"attributes,omitempty"`
	Ports []portJSON `json:"ports,omitempty"`
}

// attrJSON is ib.DeviceAttr under names that stay.
type attrJSON struct {
	Firmware     string   `json:"firmware"`
	NodeGUID     string   `json:"node_guid"`
	SysImageGUID string   `json:"sys_image_guid"`
	VendorID     uint32   `json:"vendor_id"`
	VendorPartID uint32   `json:"vendor_part_id"`
	HWVersion    uint32   `json:"hw_version"`
	Capabilities []string `json:"capabilities"`
	Limits       limits   `json:"limits"`
}

// A limit is a number of ib.DeviceAttr with its name.
type limit struct {
	name, what string
	value      uint64
}

// limits is written as a JSON object in the order of the list.
type limits []limit

func (l limits) MarshalJSON() ([]byte, error) {
	var b strings.Builder
	for i, x := range l {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, "%q:%d", x.name, x.value)
	}
	return []byte("{" + b.String() + "}"), nil
}

type portJSON struct {
	Port       uint8     `json:"port"`
	State      string    `json:"state"`
	LinkLayer  string    `json:"link_layer"`
	MaxMTU     int       `json:"max_mtu"`
	ActiveMTU  int       `json:"active_mtu"`
	LID        uint16    `json:"lid"`
	SMLID      uint16    `json:"sm_lid"`
	MaxMessage uint32    `json:"max_message_bytes"`
	GIDTable   int       `json:"gid_table_size"`
	PKeyTable  int       `json:"pkey_table_size"`
	GIDs       []gidJSON `json:"gids"`
}

type gidJSON struct {
	Index  int    `json:"index"`
	GID    string `json:"gid"`
	Type   string `json:"type"`
	Addr   string `json:"address,omitempty"` // the GID as an IP address, on RoCE
	NetDev string `json:"netdev,omitempty"`

	// Of software NICs only: how peers are met from there ("memory", or "udp" and "tcp"), of these what --path leaves; by which UDP port;
	// or why there is none.
	Paths   []string `json:"paths,omitempty"`
	UDPPort uint16   `json:"udp_port,omitempty"`
	Problem string   `json:"problem,omitempty"`
}

func newDevices() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "devices [NAME...]",
		Short: "List RDMA devices, and say which one programs get and why",
		Long: `devices lists the RDMA devices of all tiers: hardware, the kernel's software
devices (Soft-RoCE, soft iWARP), and the software NIC of this program. It says
which of them a program gets that names none, and why no better one; the
environment variable ` + verbs.EnvDevice + ` decides otherwise.

With -v, limits, capabilities and GID tables too, as ibv_devinfo -v does, and
the character devices that a container needs to be given to use the device. Of
the software NIC's GIDs it then says by which paths others are met from there,
and at which UDP port a program that begins now receives: 4791, or another if a
program has that. RINGSIDE_PATH, if it is set, decides for connections of
package transport. With --path, that path is looked at only, whatever
RINGSIDE_PATH says; of a software NIC's GIDs, those are shown that have it, and
with -v why others do not.`,
		Example: "  ringside devices\n  ringside devices -v soft0\n  ringside devices --path tcp soft0\n  ringside devices -o json | jq .choice",
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			var names []string
			devs, _ := verbs.Devices()
			for _, d := range devs {
				names = append(names, d.Name)
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
	}
	output := outputFlag(cmd)
	verbose := cmd.Flags().BoolP("verbose", "v", false, "limits, capabilities, GID tables and character devices too")
	path := pathFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, names []string) error {
		forced := transport.PathAny
		if path.v != perf.PathAuto.String() {
			forced = transport.Path(path.v)
		}
		r, err := inspect(names, *verbose || *output == "json", forced)
		if err != nil {
			return err
		}
		if *output == "json" {
			e := json.NewEncoder(cmd.OutOrStdout())
			e.SetIndent("", "  ")
			return e.Encode(r)
		}
		return r.writeText(cmd.OutOrStdout(), *verbose)
	}
	return cmd
}

// inspect looks at the named devices, or at all. full: also at what has a software NIC open its UDP ports. forced: at that path only, and
// at all that it takes.
func inspect(names []string, full bool, forced transport.Path) (*deviceReport, error) {
	r := &deviceReport{Schema: devicesSchema, Devices: []deviceJSON{}, Path: os.Getenv("RINGSIDE_PATH"), Problems: []string{}, forced: forced}
	if forced != transport.PathAny {
		full, r.Path = true, string(forced)
	}
	switch transport.Path(r.Path) {
	case transport.PathAny, transport.PathMemory, transport.PathUDP, transport.PathTCP:
	default:
		r.Problems = append(r.Problems, fmt.Sprintf("RINGSIDE_PATH is %q, which package transport refuses: there are %q, %q and %q", r.Path,
			transport.PathMemory, transport.PathUDP, transport.PathTCP))
	}
	devs, err := verbs.Devices()
	for _, e := range unjoin(err) {
		r.Problems = append(r.Problems, e.Error())
	}
	wanted := map[string]bool{}
	for _, n := range names {
		wanted[n] = true
	}
	var have []string
	choice, err := automatic()
	if err != nil {
		r.Problems = append(r.Problems, err.Error())
	} else {
		r.Choice = &choiceJSON{Device: choice.Device.Name, Reason: choice.Reason, Passed: choice.Passed}
		if r.Choice.Passed == nil {
			r.Choice.Passed = []verbs.Passed{}
		}
	}
	for _, d := range devs {
		have = append(have, d.Name)
		if len(names) > 0 && !wanted[d.Name] {
			continue
		}
		delete(wanted, d.Name)
		j := inspectDevice(d, full, forced)
		j.Chosen = r.Choice != nil && r.Choice.Device == d.Name
		r.Devices = append(r.Devices, j)
	}
	for _, n := range names {
		if wanted[n] {
			return nil, fmt.Errorf("no device is called %q: there are %s", n, strings.Join(have, ", "))
		}
	}
	return r, nil
}

// unjoin returns the parts of a joined error, below any wrapping.
func unjoin(err error) []error {
	for e := err; e != nil; e = errors.Unwrap(e) {
		if j, ok := e.(interface{ Unwrap() []error }); ok {
			return j.Unwrap()
		}
	}
	if err == nil {
		return nil
	}
	return []error{err}
}

// automatic returns which device a program gets that names none.
func automatic() (verbs.Choice, error) {
	c, err := verbs.Open("")
	if err != nil {
		return verbs.Choice{}, err
	}
	defer c.Close()
	return c.Choice(), nil
}

func inspectDevice(d verbs.DeviceInfo, full bool, forced transport.Path) deviceJSON {
	j := deviceJSON{Name: d.Name, Provider: d.Provider, Tier: d.Tier.String(), GUID: d.GUID.String(), NetDevs: d.NetDevs, CharDevs: d.CharDevs}
	if j.NetDevs == nil {
		j.NetDevs = []string{}
	}
	if j.CharDevs == nil {
		j.CharDevs = []string{}
	}
	c, err := verbs.Open(d.Name)
	if err != nil {
		j.Error = err.Error()
		return j
	}
	defer c.Close()
	a, err := c.QueryDevice()
	if err != nil {
		j.Error = err.Error()
		return j
	}
	j.Attr = attrOf(&a)
	for n := 1; n <= a.Ports; n++ {
		p, err := inspectPort(c, uint8(n), full, forced)
		if err != nil {
			j.Error = err.Error()
			return j
		}
		j.Ports = append(j.Ports, p)
	}
	return j
}

func inspectPort(c *verbs.Context, n uint8, full bool, forced transport.Path) (portJSON, error) {
	p, err := c.QueryPort(n)
	if err != nil {
		return portJSON{}, err
	}
	gids, err := c.GIDs(n)
	if err != nil {
		return portJSON{}, err
	}
	j := portJSON{Port: n, State: p.State.String(), LinkLayer: p.LinkLayer.String(), MaxMTU: p.MaxMTU.Bytes(), ActiveMTU: p.ActiveMTU.Bytes(),
		LID: uint16(p.LID), SMLID: uint16(p.SMLID), MaxMessage: p.MaxMessage, GIDTable: p.GIDTable, PKeyTable: p.PKeyTable, GIDs: []gidJSON{}}
	for _, g := range gids {
		e := gidJSON{Index: g.Index, GID: g.GID.String(), Type: g.Type.String(), NetDev: g.NetDev}
		if g.Type == ib.GIDRoCEv1 || g.Type == ib.GIDRoCEv2 {
			e.Addr = g.GID.Addr().String()
		}
		if full && c.Provider() == "soft" {
			e.softPaths(c, n, forced)
		}
		j.GIDs = append(j.GIDs, e)
	}
	return j, nil
}

// softPaths says how a software NIC's peers are met from a GID: all ways, or whether by the forced one.
func (e *gidJSON) softPaths(c *verbs.Context, port uint8, forced transport.Path) {
	may := func(p transport.Path) bool { return forced == transport.PathAny || forced == p }
	switch {
	case e.Addr == "" && !may(transport.PathMemory):
		e.Problem = "peers are met through memory from here"
	case e.Addr == "":
		e.Paths = []string{string(transport.PathMemory)}
	case forced == transport.PathMemory:
		e.Problem = "peers are met over networks from here"
	}
	if e.Addr == "" || forced == transport.PathMemory {
		return
	}
	if may(transport.PathUDP) {
		var err error
		if e.UDPPort, err = c.UDPPort(port, e.Index); err != nil {
			e.Problem = err.Error()
		} else {
			e.Paths = append(e.Paths, string(transport.PathUDP))
		}
	}
	if may(transport.PathTCP) {
		e.Paths = append(e.Paths, string(transport.PathTCP))
	}
}

// paths is the same in words.
func (e *gidJSON) paths() string {
	has := func(p transport.Path) bool { return slices.Contains(e.Paths, string(p)) }
	and := ""
	if has(transport.PathTCP) {
		and = " and TCP"
	}
	switch {
	case len(e.Paths) == 0 && e.Problem == "":
		return ""
	case len(e.Paths) == 0:
		return ": no: " + e.Problem
	case e.Problem != "":
		return ": by TCP; not by UDP: " + e.Problem
	case e.Addr == "":
		return ": through memory, on this host"
	case !has(transport.PathUDP):
		return ": by TCP"
	case e.UDPPort != roce.Port:
		return fmt.Sprintf(": by UDP port %d%s; a program has port %d, by which rxe, hardware and connection managers are met", e.UDPPort, and, roce.Port)
	}
	return fmt.Sprintf(": by UDP port %d%s", e.UDPPort, and)
}

func attrOf(a *ib.DeviceAttr) *attrJSON {
	j := &attrJSON{Firmware: a.Firmware, NodeGUID: a.NodeGUID.String(), SysImageGUID: a.SysImageGUID.String(),
		VendorID: a.VendorID, VendorPartID: a.VendorPartID, HWVersion: a.HWVersion, Capabilities: strings.Fields(a.Caps.String())}
	if j.Capabilities == nil {
		j.Capabilities = []string{}
	}
	add := func(name string, v uint64, what string) { j.Limits = append(j.Limits, limit{name, what, v}) }
	n := func(v int) uint64 { return uint64(max(v, 0)) }
	add("ports", n(a.Ports), "ports")
	add("max_mr_size_bytes", a.MaxMRSize, "bytes of a memory region")
	add("page_size_mask", a.PageSizeCap, "page sizes, one bit each")
	add("max_qp", n(a.MaxQP), "queue pairs")
	add("max_qp_wr", n(a.MaxQPWR), "work requests of one queue")
	add("max_sge", n(a.MaxSGE), "scatter/gather elements of one work request")
	add("max_sge_read", n(a.MaxSGERead), "... of an RDMA READ")
	add("max_inline_bytes", n(a.MaxInline), "bytes of inline data")
	add("max_cq", n(a.MaxCQ), "completion queues")
	add("max_cqe", n(a.MaxCQE), "entries of one completion queue")
	add("max_mr", n(a.MaxMR), "memory regions")
	add("max_mw", n(a.MaxMW), "memory windows")
	add("max_pd", n(a.MaxPD), "protection domains")
	add("max_ah", n(a.MaxAH), "address handles")
	add("max_srq", n(a.MaxSRQ), "shared receive queues")
	add("max_srq_wr", n(a.MaxSRQWR), "receives of one shared receive queue")
	add("max_srq_sge", n(a.MaxSRQSGE), "scatter/gather elements of those")
	add("max_qp_rd_atom", n(a.MaxQPRdAtomic), "READs and atomics in flight to one QP")
	add("max_qp_init_rd_atom", n(a.MaxQPInitRdAtom), "READs and atomics in flight from one QP")
	add("max_pkeys", n(a.MaxPKeys), "partition keys")
	add("max_moderate_count", n(a.MaxModerateCount), "completions that an event can be made to wait for")
	add("max_moderate_period_us", uint64(a.MaxModeratePeriod.Microseconds()), "microseconds that an event can be made to wait")
	return j
}

// pageSizes writes a mask of page sizes in words; of many, the smallest and the largest.
func pageSizes(mask uint64) string {
	var s []string
	for i := range 64 {
		if mask&(1<<i) == 0 {
			continue
		}
		unit := i / 10
		s = append(s, fmt.Sprintf("%d %s", 1<<(i%10), []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}[unit]))
	}
	if len(s) > 4 {
		return s[0] + " to " + s[len(s)-1]
	}
	return strings.Join(s, ", ")
}

func (r *deviceReport) writeText(w io.Writer, verbose bool) error {
	var b strings.Builder
	for i := range r.Devices {
		r.Devices[i].writeText(&b, verbose, r.forced)
		b.WriteByte('\n')
	}
	if len(r.Devices) == 0 {
		b.WriteString("no devices\n\n")
	}
	if c := r.Choice; c != nil {
		fmt.Fprintf(&b, "programs that name no device get %s: %s\n", c.Device, c.Reason)
		for _, p := range c.Passed {
			fmt.Fprintf(&b, "  not %s\n", p)
		}
	}
	if r.forced != transport.PathAny {
		fmt.Fprintf(&b, "paths of software NICs: only %s\n", r.forced)
	} else if r.Path != "" {
		fmt.Fprintf(&b, "connections of package transport: RINGSIDE_PATH=%s\n", r.Path)
	}
	for _, p := range r.Problems {
		fmt.Fprintf(&b, "problem: %s\n", p)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (d *deviceJSON) writeText(w io.Writer, verbose bool, forced transport.Path) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	defer tw.Flush()
	mark := ""
	if d.Chosen {
		mark = "  (chosen)"
	}
	fmt.Fprintf(w, "%s%s\n", d.Name, mark)
	row := func(name string, format string, a ...any) {
		fmt.Fprintf(tw, "    %s\t%s\n", name, fmt.Sprintf(format, a...))
	}
	row("provider", "%s, %s", d.Provider, d.Tier)
	if d.Attr == nil {
		row("GUID", "%s", d.GUID)
	} else {
		row("GUID", "%s", d.Attr.NodeGUID)
	}
	if len(d.NetDevs) > 0 {
		row("net devices", "%s", strings.Join(d.NetDevs, " "))
	}
	if verbose && len(d.CharDevs) > 0 {
		row("character devices", "%s", strings.Join(d.CharDevs, " "))
	}
	if a := d.Attr; a != nil {
		if a.Firmware != "" {
			row("firmware", "%s", a.Firmware)
		}
		if verbose {
			row("system image GUID", "%s", a.SysImageGUID)
			row("vendor", "%#06x, part %#x, hardware version %#x", a.VendorID, a.VendorPartID, a.HWVersion)
		}
		caps := strings.Join(a.Capabilities, " ")
		if caps == "" {
			caps = "none"
		}
		row("capabilities", "%s", caps)
		if verbose {
			for _, l := range a.Limits {
				switch {
				case l.name == "ports": // they follow
				case l.name == "page_size_mask" && l.value != 0:
					row(l.name, "%#x\t%s: %s", l.value, l.what, pageSizes(l.value))
				default:
					row(l.name, "%d\t%s", l.value, l.what)
				}
			}
		}
	}
	for _, p := range d.Ports {
		row(fmt.Sprintf("port %d", p.Port), "%s, %s, MTU %d (of %d)", p.State, p.LinkLayer, p.ActiveMTU, p.MaxMTU)
		if verbose {
			row("  max message", "%d bytes", p.MaxMessage)
			if p.LinkLayer == ib.LinkInfiniBand.String() {
				row("  LID", "%d, subnet manager %d", p.LID, p.SMLID)
			}
			row("  tables", "%d GIDs, %d P_Keys", p.GIDTable, p.PKeyTable)
		}
		which := forced != transport.PathAny && d.Provider == "soft"
		left := 0
		for i, g := range p.GIDs {
			if !verbose && (which && len(g.Paths) == 0 || !which && i > 0) {
				left++
				continue
			}
			more := ""
			if g.Addr != "" {
				more = ", " + g.Addr
			}
			if g.NetDev != "" {
				more += ", " + g.NetDev
			}
			row(fmt.Sprintf("  GID %d", g.Index), "%s (%s%s)%s", g.GID, g.Type, more, g.paths())
		}
		if left > 0 {
			row("", "... and %d more (-v)", left)
		}
	}
	if d.Error != "" {
		row("problem", "%s", d.Error)
	}
}
