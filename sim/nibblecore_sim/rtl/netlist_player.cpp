// Clock of netlist_player.sv: in every cycle new inputs, then the outputs are written down, then the edge.

#include "Vtop.h"
#include "verilated.h"

int main(int argc, char** argv) {
    VerilatedContext context;
    context.commandArgs(argc, argv);
    Vtop top{&context};
    const auto pulse = [&](CData& signal) {
        signal = 1;
        top.eval();
        signal = 0;
        top.eval();
    };
    top.eval();
    while (true) {
        pulse(top.advance);
        if (context.gotFinish()) break;
        pulse(top.record);
        pulse(top.clk);
    }
    top.final();
    return 0;
}
