package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

// The software NIC's own connection manager, in the place of the kernel's: with itself between two network namespaces, and with the
// C programs on rxe.

// A softRun is a run of rping or ucmatose, and with Local who does it on the software NIC.
type softRun struct {
	Name          string
	Size, Count   int
	Connections   int  // ucmatose
	Numbered      bool // the server is this program, too
	Events        bool
	Device        string // default soft0
	Local, Remote string // Remote: of the server that this side dials; empty: it is the server
	Port          int
}

var softRuns = []softRun{
	{Name: "rping", Size: 64, Count: 12},
	{Name: "rping", Size: rpingMax, Count: 5, Events: true},
	{Name: "ucmatose", Size: 4096, Count: 20, Connections: 3},
	{Name: "ucmatose", Size: 100, Connections: 2, Events: true},
}

func (r *softRun) String() string { return fmt.Sprintf("%s-%d-%d", r.Name, r.Size, r.Count) }

// listeningLine is what a child says when its server takes connections.
const listeningLine = "listening"

func init() {
	testutil.RegisterChild("soft-cm", func(args []string) {
		var r softRun
		if err := json.Unmarshal([]byte(args[0]), &r); err != nil {
			fmt.Println(err)
			os.Exit(2)
		}
		p := r.here()
		*p.side() = cmSide{device: cmp.Or(r.Device, "soft0"), local: r.Local, remote: r.Remote, port: r.Port, events: r.Events,
			listening: func(netip.AddrPort) { fmt.Println(listeningLine) }}
		result, err := p.start(context.Background())
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println(result)
	})
}

// here is the run as this program does it.
func (r *softRun) here() cmRun {
	if r.Name == "rping" {
		o := rpingDefaults()
		o.size, o.count, o.validate = r.Size, r.Count, true
		return &o
	}
	o := ucmatoseDefaults()
	o.size, o.count, o.connections, o.numbered = r.Size, r.Count, r.Connections, r.Numbered
	return &o
}

// args are the C program's arguments, as the server at local, or the client of remote.
func (r *softRun) args(local, remote string, port int) []string {
	args := []string{"-S", strconv.Itoa(r.Size), "-C", strconv.Itoa(r.Count), "-p", strconv.Itoa(port)}
	switch {
	case r.Name == "rping" && remote == "":
		return append(args, "-s", "-a", local)
	case r.Name == "rping":
		return append(args, "-c", "-V", "-I", local, "-a", remote)
	}
	args = append(args, "-c", strconv.Itoa(r.Connections), "-b", local)
	if remote != "" {
		args = append(args, "-s", remote)
	}
	return args
}

// child starts the run on the software NIC of a network namespace. A server listens when this returns.
func (r softRun) child(t *testing.T, namespace, env, local, remote string, port int) *testutil.Child {
	t.Helper()
	r.Local, r.Remote, r.Port = local, remote, port
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	c := testutil.StartChildIn(t, namespace, []string{env}, "soft-cm", string(b))
	if remote == "" {
		c.Expect(listeningLine)
	}
	return c
}

const softPort = 7175

func TestSoftCMBetweenNamespaces(t *testing.T) {
	n := testutil.NewNetwork(t)
	server, client := n.Addrs[0].String(), n.Addrs[1].String()
	for how, env := range map[string]string{"clean": "", "bad": "RINGSIDE_SOFT_FAULTS=loss=2%,duplicate=2%,reorder=5%"} {
		for _, r := range softRuns {
			r.Numbered = true
			t.Run(how+"/"+r.String(), func(t *testing.T) {
				s := r.child(t, n.Namespaces[0], env, server, "", softPort)
				c := r.child(t, n.Namespaces[1], env, client, server, softPort)
				if err := c.Wait(); err != nil {
					t.Errorf("client: %v", err)
				}
				if err := s.Wait(); err != nil {
					t.Errorf("server: %v", err)
				}
			})
		}
	}
}
