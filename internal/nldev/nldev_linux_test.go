package nldev

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/abi"
	"github.com/ringside-rdma/ringside/internal/netlink"
	"github.com/ringside-rdma/ringside/internal/testutil"
)

func TestMain(m *testing.M) { testutil.Main(m) }

// recorded returns the bodies of a Linux 6.1 machine's answers (test/soft-roce): what was asked, then a line of
// hexadecimal for each answer. They are little-endian.
func recorded(t testing.TB) map[string][][]byte {
	t.Helper()
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("the recording is of a little-endian machine")
	}
	text, err := os.ReadFile("testdata/linux-6.1.txt")
	if err != nil {
		t.Fatal(err)
	}
	answers := map[string][][]byte{}
	for line := range strings.Lines(string(text)) {
		what, data, ok := strings.Cut(strings.TrimSpace(line), ": ")
		body, err := hex.DecodeString(data)
		if !ok || err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		answers[what] = append(answers[what], body)
	}
	return answers
}

// player answers as the recorded kernel did.
func player(t *testing.T) *Conn {
	answers := recorded(t)
	play := func(m netlink.Message, fn func([]byte)) error {
		names := map[uint16]string{abi.RDMA_NLDEV_CMD_GET: "devices", abi.RDMA_NLDEV_CMD_PORT_GET: "ports",
			abi.RDMA_NLDEV_CMD_GET_CHARDEV: "chardev", abi.RDMA_NLDEV_CMD_SYS_GET: "system"}
		what := names[binary.NativeEndian.Uint16(m[4:])&0x3ff]
		if err := netlink.Attributes(m[unix.SizeofNlMsghdr:], func(typ uint16, v []byte) {
			if typ == abi.RDMA_NLDEV_ATTR_DEV_INDEX {
				what += " of " + string('0'+v[0])
			}
		}); err != nil {
			return err
		}
		if len(answers[what]) == 0 {
			return unix.EINVAL
		}
		for _, body := range answers[what] {
			fn(body)
		}
		return nil
	}
	return &Conn{get: play, dump: play}
}

func TestRecorded(t *testing.T) {
	c := player(t)
	list, err := c.Devices()
	if err != nil {
		t.Fatal(err)
	}
	for i := range list {
		if err := errors.Join(c.Chardev(&list[i]), c.NetDevs(&list[i])); err != nil {
			t.Error(err)
		}
	}
	if len(list) != 4 {
		t.Fatalf("%+v", list)
	}
	for i, want := range map[int]Device{
		0: {Name: "rxe0", HasIndex: true, Ports: 1, NodeType: abi.RDMA_NODE_IB_CA, NodeGUID: 0xfffe000001, Protocol: "roce", NetDevs: []string{"veth0"},
			Chardev: "uverbs0", Major: 231, Minor: 192, ABI: 2, DriverID: abi.RDMA_DRIVER_RXE, HasDriverID: true},
		3: {Name: "siw1", Index: 3, HasIndex: true, Ports: 1, NodeType: abi.RDMA_NODE_RNIC, NodeGUID: 0xfffe000002, Protocol: "iw", NetDevs: []string{"veth1"},
			Chardev: "uverbs3", Major: 231, Minor: 195, ABI: 1, DriverID: abi.RDMA_DRIVER_SIW, HasDriverID: true},
	} {
		if d := cmp.Diff(want, list[i]); d != "" {
			t.Error(d)
		}
	}
	if s, err := c.System(); err != nil || s.NetNSExclusive || !s.CopyOnFork {
		t.Error(s, err)
	}
	gone := Device{Name: "rxe9", Index: 9}
	for _, err := range []error{c.Chardev(&gone), c.NetDevs(&gone)} {
		if !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "rxe9") {
			t.Error(err)
		}
	}
}

// What rarely or never occurs: two ports, an unknown attribute, numbers past 255, old kernels that leave things out.
func TestParse(t *testing.T) {
	attrs := func() netlink.Message { return nil }
	d, err := parseDevice(attrs().Text(abi.RDMA_NLDEV_ATTR_DEV_NAME, "mlx5_0").Text(abi.RDMA_NLDEV_ATTR_FW_VERSION, "16.35.4506").
		U32(abi.RDMA_NLDEV_ATTR_PORT_INDEX, 2).U32(9999, 1).Attr(abi.RDMA_NLDEV_ATTR_DEV_NODE_TYPE, []byte{1, 2}))
	if want := (Device{Name: "mlx5_0", Firmware: "16.35.4506", Ports: 2}); err != nil || !cmp.Equal(d, want) {
		t.Errorf("%+v, %v", d, err)
	}
	dev := uint64(259<<8 | 0x12<<20 | 0x34)
	if err := parseChardev(&d, attrs().Attr(abi.RDMA_NLDEV_ATTR_CHARDEV, binary.NativeEndian.AppendUint64(nil, dev))); err != nil ||
		d.Major != 259 || d.Minor != 0x1234 || d.HasDriverID {
		t.Errorf("%+v, %v", d, err)
	}
	if d.Chardev = "uverbs2"; d.Path() != "/dev/infiniband/uverbs2" {
		t.Error(d.Path())
	}
	for mode, exclusive := range map[byte]bool{0: true, 1: false} {
		var s System
		if err := parseSystem(&s, attrs().Attr(abi.RDMA_NLDEV_SYS_ATTR_NETNS_MODE, []byte{mode})); err != nil || s.NetNSExclusive != exclusive || s.CopyOnFork {
			t.Errorf("mode %d: %+v, %v", mode, s, err)
		}
	}
	if _, err := parseDevice(attrs().U32(abi.RDMA_NLDEV_ATTR_DEV_INDEX, 3)); err == nil {
		t.Error("a device without a name")
	}
	if _, err := parseDevice([]byte{3, 0, 1, 0}); err == nil {
		t.Error("an attribute shorter than its header")
	}
	ports := &Conn{dump: func(_ netlink.Message, fn func([]byte)) error {
		for _, name := range []string{"eth0", "", "eth1", "eth0"} {
			body := attrs().U32(abi.RDMA_NLDEV_ATTR_PORT_INDEX, 1)
			if name != "" {
				body = body.Text(abi.RDMA_NLDEV_ATTR_NDEV_NAME, name)
			}
			fn(body)
		}
		return nil
	}}
	if err := ports.NetDevs(&d); err != nil || !cmp.Equal(d.NetDevs, []string{"eth0", "eth1"}) {
		t.Error(d.NetDevs, err)
	}
}

// What rdma of iproute2 sends, but for the order of attributes, which the kernel does not mind. The words in hexadecimal
// are length and type of the header, then each attribute.
func TestLinkMessages(t *testing.T) {
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("the messages are a little-endian machine's")
	}
	for _, c := range []struct {
		name string
		m    netlink.Message
		want string
	}{
		{"rdma link add", addLinkMessage("rxe0", "rxe", "veth0"),
			"30000000 0314 0100 01000000 00000000" +
				"0900 0200 7278653000000000" + // rxe0
				"0800 4100 72786500" + // rxe
				"0a00 3300 766574683000 0000"}, // veth0
		{"rdma link delete", removeLinkMessage(5), "18000000 0414 0100 01000000 00000000" + "0800 0100 05000000"},
	} {
		got := hex.EncodeToString(c.m.Finish(1))
		want := strings.ReplaceAll(c.want, " ", "")
		if got != want {
			t.Errorf("%s:\n got %s\nwant %s", c.name, got, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(netlink.Message(nil).U32(abi.RDMA_NLDEV_ATTR_DEV_INDEX, 3).Text(abi.RDMA_NLDEV_ATTR_DEV_NAME, "rxe0")))
	f.Add([]byte{255, 255, 2, 0, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := parseDevice(b)
		if err == nil && d.Name == "" {
			t.Errorf("%+v is no device", d)
		}
		_ = parseChardev(&d, b)
		_, _ = parsePort(b)
		_ = parseSystem(new(System), b)
	})
}

// On a kernel with RDMA: the list agrees with sysfs.
func TestKernel(t *testing.T) {
	c, err := Dial()
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		testutil.Skip(t, "no RDMA in this kernel; go run ./test/soft-roce -- go test ./internal/nldev has it")
	}
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	list, err := c.Devices()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range list {
		if err := errors.Join(c.Chardev(&d), c.NetDevs(&d)); err != nil {
			t.Log(err) // another package's tests may just be removing it
			continue
		}
		t.Logf("%+v", d)
		if name, err := os.ReadFile("/sys/class/infiniband_verbs/" + d.Chardev + "/ibdev"); err != nil || strings.TrimSpace(string(name)) != d.Name {
			t.Errorf("%s: %q, %v", d.Name, name, err)
		}
	}
	s, err := c.System()
	if err != nil {
		t.Error(err)
	}
	t.Logf("%+v", s)
	if err := c.RemoveLink("no-such-link"); err != nil {
		t.Error(err)
	}
	if os.Getenv("RINGSIDE_SOFT_ROCE") == "" {
		return // elsewhere it might load a module
	}
	if err := c.AddLink("rxe9", "rxe", "no-such-netdev"); !errors.Is(err, unix.ENODEV) || !strings.Contains(err.Error(), "no-such-netdev") {
		t.Error(err)
	}
	if err := c.AddLink("rxe9", "nonesuch", "lo"); !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), "module of nonesuch") {
		t.Error(err)
	}
}
