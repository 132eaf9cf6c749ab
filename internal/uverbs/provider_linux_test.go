package uverbs

import (
	"errors"
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/internal/driver"
)

// A device is opened only if its driver speaks a version that the provider does, and is described as the provider's.
func TestProvider(t *testing.T) {
	opened := errors.New("opened")
	for _, c := range []struct {
		min, max, abi uint64
		want          string // "": it is opened
	}{
		{1, 2, 0, "mine9: the kernel's mine driver has version 0 of its interface, and this program knows 1 to 2"},
		{1, 2, 1, ""}, {1, 2, 2, ""},
		{1, 2, 3, "has version 3 of its interface, and this program knows 1 to 2"},
		{5, 5, 5, ""},
		{5, 5, 6, "has version 6 of its interface, and this program knows 5"},
	} {
		var got *Device
		p := &Provider{Kind: "mine", DriverID: 77, Tier: driver.TierKernelSoft, MinABI: c.min, MaxABI: c.max,
			New: func(d *Device) (driver.Context, error) { got = d; return nil, opened }}
		d := &device{p, Device{Name: "mine9", ABI: c.abi, NodeGUID: 5, NetDevs: []string{"eth9"}}}
		if i := d.Info(); p.Name() != "mine" || i.Name != "mine9" || i.Provider != "mine" || i.Tier != driver.TierKernelSoft || i.GUID != 5 || len(i.NetDevs) != 1 {
			t.Errorf("%+v", i)
		}
		_, err := d.Open()
		if c.want == "" {
			if err != opened || got != &d.d {
				t.Errorf("version %d: %v", c.abi, err)
			}
		} else if got != nil || err == nil || !strings.HasSuffix(err.Error(), c.want) {
			t.Errorf("version %d: %v, want %s", c.abi, err, c.want)
		}
	}
}
